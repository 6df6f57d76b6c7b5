"""The model: caches, generation, padding, packing, precision, compilation, saving, adapters."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.quantizers.quantizers_utils import should_convert_module

from hydrahead import HydraHeadForCausalLM, HydraHeadModel, modeling_hydrahead
from hydrahead.convert.migration import convert_model
from hydrahead.tests.families import (
    ALL_FULL,
    ALL_LINEAR,
    HEADS,
    LAYERS,
    LLAMA3_ROPE,
    LONGROPE,
    MIXED,
    VOCAB,
    bf16_teacher,
    make_student,
    make_teacher,
    mask_examples,
    random_ids,
    random_masks,
)

# Logits are of order 5 and differ by the order of fp32 sums only: 1e-5 is usual, 1e-4 the promise (issue A).
CACHE_TOLERANCE = 1e-4
# Full-attention heads everywhere, nowhere, in some layers, irregular.
MASKS = mask_examples(2)
NO_END = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def gradients(_without_gradients):
    with torch.enable_grad():
        yield


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = CACHE_TOLERANCE) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance, difference


def make_cache(kind: str, student: HydraHeadForCausalLM):
    return DynamicCache(config=student.config) if kind == "dynamic" else StaticCache(student.config, max_cache_len=40)


def feed(student, ids, sizes, cache, mask=None) -> torch.Tensor:
    """Logits of `ids`, fed in pieces of the given sizes; what is left over comes last, in one piece."""
    logits, start = [], 0
    for size in [*sizes, ids.shape[1]]:
        end = min(start + size, ids.shape[1])
        if end > start:
            seen = None if mask is None else mask[:, :end]
            logits.append(
                student(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True).logits
            )
        start = end
    return torch.cat(logits, dim=1)


def states(cache) -> list[torch.Tensor]:
    """Convolution and recurrent states of all layers."""
    tensors = []
    for layer in cache.layers:
        for by_index in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            tensors += [tensor for tensor in by_index.values() if tensor is not None]
    return tensors


# ---------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "sizes", [[12] + [1] * 8, [1] * 20, [2, 1, 3, 1, 1, 2], [3, 3, 3, 3, 3], [7, 5, 1, 7], [4, 5, 11], [20]], ids=str
)
def test_prefill_chunks_and_steps_equal_one_forward(masks, kind, sizes):
    student, ids = make_student(head_masks=masks), random_ids(2, 20)
    assert_close(feed(student, ids, sizes, make_cache(kind, student)), student(ids).logits)


@given(masks=random_masks(), sizes=st.lists(st.integers(1, 5), max_size=6), seed=st.integers(0, 9))
@example(masks=ALL_LINEAR, sizes=[1, 1], seed=0)
@example(masks=[[0] * HEADS, [1] * HEADS], sizes=[2, 3], seed=0)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("kernel_size", [2, 4, 7])
@settings(max_examples=8)
def test_pieces_of_any_size_equal_one_forward(kind, kernel_size, masks, sizes, seed):
    student = make_student(head_masks=masks, short_conv_kernel_size=kernel_size, full_attention_position="rope")
    ids = random_ids(2, 16, seed)
    assert_close(feed(student, ids, sizes, make_cache(kind, student)), student(ids).logits)


@pytest.mark.parametrize("masks", MASKS)
def test_a_longer_text_than_one_kernel_chunk_continues_from_the_cache(masks):
    student, ids = make_student(head_masks=masks), random_ids(1, 200)
    assert_close(feed(student, ids, [70, 1, 64, 60, 3], DynamicCache(config=student.config)), student(ids).logits)


@pytest.mark.parametrize("masks", MASKS)
def test_a_static_cache_can_be_reset_and_used_again(masks):
    student, cache = make_student(head_masks=masks), None
    for seed in range(2):
        cache = cache or make_cache("static", student)
        ids = random_ids(2, 9, seed)
        assert_close(feed(student, ids, [5, 1, 2], cache), student(ids).logits)
        cache.reset()


@pytest.mark.parametrize("masks", MASKS)
def test_the_cache_counts_the_tokens_seen(masks):
    student = make_student(head_masks=masks)
    for kind in ("dynamic", "static"):
        cache = make_cache(kind, student)
        feed(student, random_ids(2, 9), [5, 1], cache)
        assert int(cache.get_seq_length()) == 9


@pytest.mark.parametrize("masks", MASKS)
def test_reordering_a_cache_moves_both_branches(masks):
    student, ids, order = make_student(head_masks=masks), random_ids(3, 10), torch.tensor([2, 0, 0])
    cache = DynamicCache(config=student.config)
    student(ids[:, :7], past_key_values=cache, use_cache=True)
    cache.reorder_cache(order)
    continued = torch.cat([ids[order, :7], ids[:, 7:]], dim=1)
    logits = student(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    assert_close(logits, student(continued).logits[:, 7:])


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("masks", MASKS)
def test_greedy_generation_equals_repeated_forwards_with_either_cache(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, student(expected).logits[:, -1:].argmax(-1)], dim=1)
    for cache in ("dynamic", "static"):
        output = student.generate(ids, max_new_tokens=12, cache_implementation=cache, disable_compile=True, **NO_END)
        assert torch.equal(output, expected), cache
    assert torch.equal(student.generate(ids, max_new_tokens=12, use_cache=False, **NO_END), expected)
    assert torch.equal(student.generate(ids, max_new_tokens=12, prefill_chunk_size=4, **NO_END), expected)


@pytest.mark.parametrize("masks", MASKS)
def test_sampling_repeats_with_its_seed(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)

    def sample(seed):
        torch.manual_seed(seed)
        return student.generate(ids, max_new_tokens=10, **NO_END | {"do_sample": True, "temperature": 1.5})

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def sequence_log_probability(student, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """`[B]`: log-probability of what follows the prompt, by one full forward."""
    log_probabilities = student(ids).logits.log_softmax(-1)[:, prompt_length - 1 : -1]
    return log_probabilities.gather(-1, ids[:, prompt_length:, None]).squeeze(-1).sum(-1)


@pytest.mark.parametrize("masks", MASKS)
def test_beams_carry_their_own_caches(masks):
    """A beam's score is the log-probability of its tokens only if its cache has moved along with it."""
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    options = NO_END | {"max_new_tokens": 6, "num_beams": 4, "length_penalty": 0.0}
    output = student.generate(ids, num_return_sequences=4, output_scores=True, return_dict_in_generate=True, **options)
    expected = sequence_log_probability(student, output.sequences, 6)
    assert_close(output.sequences_scores, expected, 1e-3)
    greedy = sequence_log_probability(student, student.generate(ids, max_new_tokens=6, **NO_END), 6)
    assert (expected.view(2, 4).max(1).values >= greedy - 1e-3).all()


@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR])
def test_beams_as_many_as_words_find_the_best_continuation(masks):
    student, ids = make_student(head_masks=masks), random_ids(1, 6)
    first = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
    pairs = student(ids).logits[0, -1].log_softmax(-1)[:, None] + student(first).logits[:, -1].log_softmax(-1)
    best = divmod(int(pairs.argmax()), VOCAB)
    output = student.generate(ids, max_new_tokens=2, num_beams=VOCAB, length_penalty=0.0, **NO_END)
    assert tuple(output[0, 6:].tolist()) == best


@pytest.mark.parametrize("masks", MASKS)
def test_generation_goes_on_from_a_cache(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    first = student.generate(ids, max_new_tokens=5, return_dict_in_generate=True, **NO_END)
    turn = torch.cat([first.sequences, random_ids(2, 4, seed=7)], dim=1)
    expected = student.generate(turn, max_new_tokens=6, **NO_END)
    continued = student.generate(turn, past_key_values=first.past_key_values, max_new_tokens=6, **NO_END)
    assert torch.equal(continued, expected)


def test_continuous_batching_serves_where_all_heads_are_full_attention():
    student, prompts = make_student(head_masks=ALL_FULL), [random_ids(1, n, seed=n)[0].tolist() for n in (3, 11, 6)]
    options = ContinuousBatchingConfig(num_blocks=64, block_size=4, max_batch_tokens=32)
    results = student.generate_batch(
        prompts, generation_config=GenerationConfig(max_new_tokens=6, **NO_END), continuous_batching_config=options
    )
    for prompt, result in zip(prompts, results.values(), strict=True):
        expected = student.generate(torch.tensor([prompt]), max_new_tokens=6, **NO_END)[0, len(prompt) :]
        assert result.generated_tokens == expected.tolist()


def test_continuous_batching_is_refused_where_heads_are_recurrent():
    with pytest.raises(ValueError, match="no place for a recurrent state") as error:
        make_student().generate_batch([[3, 4, 5]], max_new_tokens=2)
    assert "\n" not in str(error.value)


def test_assisted_decoding_is_refused_because_a_recurrent_state_cannot_be_rolled_back():
    student, ids = make_student(), random_ids(1, 6)
    for assistance in ({"assistant_model": make_student(1)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models") as error:
            student.generate(ids, max_new_tokens=4, **assistance, **NO_END)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("masks", MASKS)
def test_generation_from_embeddings_equals_generation_from_ids(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    from_embeddings = student.generate(inputs_embeds=student.model.embed_tokens(ids), max_new_tokens=8, **NO_END)
    assert torch.equal(from_embeddings, student.generate(ids, max_new_tokens=8, **NO_END)[:, 6:])


# --------------------------------------------------------------------------------------------------- padding


def pad_rows(rows: list[torch.Tensor], side: str, filler_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, whatever ids in the padding: ids and mask `[B, T]`."""
    length = max(len(row) for row in rows) + 2
    ids = torch.randint(0, VOCAB, (len(rows), length), generator=torch.Generator().manual_seed(filler_seed))
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


ROWS = [random_ids(1, length, seed=length)[0] for length in (1, 3, 11, 7)]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("position", ["nope", "rope"])
def test_padded_rows_equal_the_rows_alone(masks, side, implementation, position):
    student = make_student(head_masks=masks, full_attention_position=position, attention_bias=True)
    student.set_attn_implementation(implementation)
    ids, mask = pad_rows(ROWS, side, filler_seed=0)
    logits = student(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(ROWS):
        assert_close(logits[i][mask[i].bool()], student(row[None]).logits[0])


@given(
    masks=random_masks(), mask=st.lists(st.booleans(), min_size=14, max_size=14).filter(any), seed=st.integers(0, 9)
)
@example(masks=ALL_LINEAR, mask=[True] * 6 + [False] * 4 + [True] * 4, seed=0)
@example(masks=MIXED, mask=[False, True] * 7, seed=0)
@settings(max_examples=20)
def test_padding_anywhere_in_a_row_changes_nothing(masks, mask, seed):
    """Also between tokens, as after a right-padded turn of a dialogue; in one piece or fed from the cache."""
    student, mask = make_student(head_masks=masks), torch.tensor([mask]).long()
    ids = random_ids(1, 14, seed)
    alone = student(ids[mask.bool()][None]).logits[0]
    assert_close(student(ids, attention_mask=mask).logits[mask.bool()], alone)
    for sizes in ([5, 3, 1, 1], [1] * 14):
        for kind in ("dynamic", "static"):
            logits = feed(student, ids, sizes, make_cache(kind, student), mask)
            assert_close(logits[mask.bool()], alone)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_do_not_depend_on_a_single_bit_of_the_padding(masks, side):
    student, seen = make_student(head_masks=masks, attention_bias=True), []
    for filler_seed in range(2):
        ids, mask = pad_rows(ROWS, side, filler_seed)
        cache = DynamicCache(config=student.config)
        logits = student(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        seen.append([logits[mask.bool()], *states(cache)])
    assert all(torch.equal(one, other) for one, other in zip(*seen))
    assert len(seen[0]) == 1 + 2 * sum(0 in row for row in masks)  # two states for each layer with linear heads


@pytest.mark.parametrize("masks", MASKS)
def test_states_of_a_padded_row_are_those_of_the_row(masks):
    """On either side: the convolution holds the last real tokens, not the padding after them."""
    student = make_student(head_masks=masks, attention_bias=True)
    for side in ("left", "right"):
        ids, mask = pad_rows(ROWS, side, filler_seed=0)
        padded = DynamicCache(config=student.config)
        student(ids, attention_mask=mask, past_key_values=padded, use_cache=True)
        for i, row in enumerate(ROWS):
            alone = DynamicCache(config=student.config)
            student(row[None], past_key_values=alone, use_cache=True)
            for one, other in zip(states(padded), states(alone)):
                assert_close(one[i], other[0])


@pytest.mark.parametrize("content", [float("inf"), float("nan"), 1e30])
def test_linear_heads_survive_anything_in_the_padding(content):
    """Embeddings that are not even numbers. (Full attention multiplies them by 0, as in every transformer.)"""
    student = make_student(head_masks=ALL_LINEAR, attention_bias=True)
    for side in ("left", "right"):
        ids, mask = pad_rows(ROWS, side, filler_seed=0)
        embeddings = student.model.embed_tokens(ids).masked_fill(~mask.bool()[..., None], content)
        cache = DynamicCache(config=student.config)
        logits = student(inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        assert all(tensor.isfinite().all() for tensor in states(cache))
        for i, row in enumerate(ROWS):
            assert_close(logits[i][mask[i].bool()], student(row[None]).logits[0])


@pytest.mark.parametrize("masks", MASKS)
def test_a_row_of_nothing_but_padding_harms_nobody(masks):
    student, ids = make_student(head_masks=masks, attention_bias=True), random_ids(2, 9)
    mask = torch.tensor([[0] * 9, [1] * 9])
    cache = DynamicCache(config=student.config)
    logits = student(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all()
    assert_close(logits[1], student(ids[1:]).logits[0])
    assert all(tensor[0].eq(0).all() for tensor in states(cache))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_may_have_any_dtype(dtype):
    student = make_student()
    ids, mask = pad_rows(ROWS, "left", filler_seed=0)
    assert torch.equal(student(ids, attention_mask=mask.to(dtype)).logits, student(ids, attention_mask=mask).logits)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_gradient(masks, side):
    student = make_student(head_masks=masks)
    ids, mask = pad_rows(ROWS, side, filler_seed=0)
    embeddings = student.model.embed_tokens(ids).detach().requires_grad_()
    student(inputs_embeds=embeddings, attention_mask=mask).logits[mask.bool()].square().sum().backward()
    assert embeddings.grad[~mask.bool()].eq(0).all()
    assert embeddings.grad[mask.bool()].ne(0).any(-1).all()


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}, {"prefill_chunk_size": 3}],
    ids=["dynamic", "static", "beams", "chunked"],
)
def test_left_padded_generation_equals_each_row_alone(masks, options):
    student = make_student(head_masks=masks)
    ids, mask = pad_rows(ROWS, "left", filler_seed=0)
    output = student.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **NO_END)
    for i, row in enumerate(ROWS):
        alone = student.generate(row[None], max_new_tokens=8, **options, **NO_END)
        assert torch.equal(output[i, ids.shape[1] :], alone[0, len(row) :])


def test_a_dialogue_goes_on_from_the_cache_in_padded_batches():
    """Two turns of different lengths per row, each turn padded by itself: the same as both turns in one row."""
    student = make_student()
    turns = [(random_ids(1, a, seed=a)[0], random_ids(1, b, seed=10 + b)[0]) for a, b in ((5, 2), (2, 6))]
    for side in ("left", "right"):
        one, one_mask = pad_rows([turn[0] for turn in turns], side, filler_seed=0)
        two, two_mask = pad_rows([turn[1] for turn in turns], side, filler_seed=1)
        cache = DynamicCache(config=student.config)
        student(one, attention_mask=one_mask, past_key_values=cache, use_cache=True)
        mask = torch.cat([one_mask, two_mask], dim=1)
        logits = student(two, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for i, turn in enumerate(turns):
            alone = student(torch.cat(turn)[None]).logits[0, len(turn[0]) :]
            assert_close(logits[i][two_mask[i].bool()], alone)


# --------------------------------------------------------------------------------------------------- packing

# A sequence of one token whose key barely matches its query has an output near zero, and the fusion's norm enlarges
# its rounding error: ten times the promise for caches. Leaks between sequences are of order 1.
PACKING_TOLERANCE = 1e-3
PACKED_LENGTHS = [[5, 1, 9, 2], [17], [1] * 17, [3, 14]]


def packed_rows(lengths=PACKED_LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(len(lengths), sum(lengths[0]))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("position", ["nope", "rope"])
def test_packed_sequences_equal_each_sequence_alone(masks, implementation, position):
    student = make_student(head_masks=masks, full_attention_position=position)
    student.set_attn_implementation(implementation)
    ids, positions = packed_rows()
    logits = student(ids, position_ids=positions).logits
    for i, lengths in enumerate(PACKED_LENGTHS):
        for sequence, of_sequence in zip(ids[i].split(lengths), logits[i].split(lengths)):
            assert_close(of_sequence, student(sequence[None]).logits[0], PACKING_TOLERANCE)


@given(masks=random_masks(), cuts=st.lists(st.booleans(), min_size=79, max_size=79))
@settings(max_examples=10)
def test_packed_sequences_never_see_each_other_whatever_the_cuts(masks, cuts):
    student, ids, position, positions = make_student(head_masks=masks), random_ids(1, 80), 0, [0]
    for cut in cuts:
        position = 0 if cut else position + 1
        positions.append(position)
    positions = torch.tensor([positions])
    starts = [*positions[0].eq(0).nonzero().squeeze(1).tolist(), 80]
    logits = student(ids, position_ids=positions).logits
    for start, end in itertools.pairwise(starts):
        assert_close(logits[:, start:end], student(ids[:, start:end]).logits, PACKING_TOLERANCE)


@pytest.mark.usefixtures("gradients")
def test_packed_sequences_give_the_gradients_of_each_sequence_alone():
    packed, apart = make_student(), make_student()
    ids, positions = packed_rows()
    packed(ids, position_ids=positions).logits.square().sum().backward()
    for i, lengths in enumerate(PACKED_LENGTHS):
        for sequence in ids[i].split(lengths):
            apart(sequence[None]).logits.square().sum().backward()
    for (name, one), (_, other) in zip(packed.named_parameters(), apart.named_parameters()):
        # Sums of some thousand terms in another order.
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-3, atol=1e-4 * other.grad.abs().max().item(), msg=name
        )


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_where_tokens_stand_is_found_once_for_all_layers(rows, monkeypatch):
    student, found = make_student(head_masks=[[0] * HEADS, MIXED[1]]), []
    kind = modeling_hydrahead.Padding if rows == "padded" else modeling_hydrahead.Packing
    real = kind.of
    monkeypatch.setattr(kind, "of", lambda *args: found.append(real(*args)) or found[-1])
    if rows == "padded":
        ids, mask = pad_rows(ROWS, "left", filler_seed=0)
        student(ids, attention_mask=mask)
    else:
        ids, positions = packed_rows()
        student(ids, position_ids=positions)
    assert len(found) == 1


@pytest.mark.parametrize("masks", MASKS)
def test_one_row_of_positions_serves_the_whole_batch(masks):
    student = make_student(head_masks=masks)
    ids, positions = packed_rows([[5, 1, 9, 2]] * 3)
    expected = student(ids, position_ids=positions).logits
    assert_close(student(ids, position_ids=positions[:1]).logits, expected, 0)


@pytest.mark.parametrize("masks", MASKS)
def test_packed_rows_are_refused_where_they_could_not_be_kept_apart(masks):
    student = make_student(head_masks=masks)
    ids, positions = packed_rows()
    for more in ({"attention_mask": torch.ones_like(ids)}, {"past_key_values": DynamicCache(config=student.config)}):
        with pytest.raises(ValueError, match="packed sequences") as error:
            student(ids, position_ids=positions, **more)
        assert "\n" not in str(error.value)


def test_packing_that_only_attention_would_see_is_refused():
    """Bounds for flash attention without position ids: recurrent heads would read on from one sequence to the next."""
    bounds = torch.tensor([0, 5, 17], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass their position_ids too") as error:
        make_student()(random_ids(1, 17), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    assert "\n" not in str(error.value)


def test_a_packed_forward_leaves_no_cache_behind():
    ids, positions = packed_rows()
    assert make_student()(ids, position_ids=positions, use_cache=True).past_key_values is None


def test_positions_that_start_late_are_not_packing():
    student, ids = make_student(), random_ids(2, 9)
    positions = torch.arange(9)[None] + 5
    assert student(ids, position_ids=positions, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR, [[0] * HEADS, [1] * HEADS]])
def test_attention_patterns_are_refused_where_heads_are_recurrent(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    pattern = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"^attention_mask must be a 2-D padding mask") as error:
        student(ids, attention_mask=pattern)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("positions", [None, torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 3, 3, 4, 4, 5]])])
def test_attention_patterns_serve_where_all_heads_are_full_attention(positions):
    student, ids = make_student(head_masks=ALL_FULL), random_ids(2, 9)
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    whole = student(ids, attention_mask=causal, position_ids=positions).logits
    if positions is None or positions.unique().numel() == 9:  # else tokens share a position, as drafts in a tree do
        assert_close(whole, student(ids).logits)
    local = causal & causal.transpose(2, 3).tril(2).transpose(2, 3).triu(-2)
    assert (student(ids, attention_mask=local, position_ids=positions).logits - whole).abs().max() > 0.1


# ----------------------------------------------------------------------------------------- inputs and outputs


@pytest.mark.parametrize("masks", MASKS)
def test_embeddings_equal_ids(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    assert torch.equal(student(inputs_embeds=student.model.embed_tokens(ids)).logits, student(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": student.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            student(**wrong)


@pytest.mark.parametrize("masks", MASKS)
def test_attention_implementations_agree(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 30)
    logits = {}
    for implementation in ("eager", "sdpa"):
        student.set_attn_implementation(implementation)
        logits[implementation] = student(ids).logits
    assert_close(logits["eager"], logits["sdpa"])


@pytest.mark.parametrize("masks", MASKS)
def test_attentions_and_hidden_states_are_given_out(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    student.set_attn_implementation("eager")
    output = student(ids, output_attentions=True, output_hidden_states=True)
    # One entry for each layer that has full-attention heads, one map for each of these heads.
    counts = [sum(row) for row in masks if any(row)]
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, count, 9, 9) for count in counts]
    for weights in output.attentions:
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-5)
        assert weights.triu(1).eq(0).all()
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(output.hidden_states[0], student.model.embed_tokens(ids))
    assert torch.equal(output.hidden_states[-1], student.model(ids).last_hidden_state)
    assert torch.equal(output.logits, student(ids).logits)
    as_tuple = student(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", [masks for masks in MASKS if masks != ALL_LINEAR])
def test_attentions_are_the_ones_that_were_used_with_their_gradients(masks):
    student = make_student(head_masks=masks)
    student.set_attn_implementation("eager")
    output = student(random_ids(2, 9), output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits.square().sum().backward()
    assert all(weights.grad.abs().max() > 0 for weights in output.attentions)


def test_logits_can_be_had_for_some_positions_only():
    student, ids = make_student(), random_ids(2, 9)
    logits = student(ids).logits
    assert_close(student(ids, logits_to_keep=1).logits, logits[:, -1:], 1e-5)
    assert_close(student(ids, logits_to_keep=4).logits, logits[:, -4:], 1e-5)
    assert_close(student(ids, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]], 1e-5)


def test_the_loss_is_cross_entropy_of_the_next_token():
    student, ids = make_student(), random_ids(2, 9)
    labels = ids.masked_fill(torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    output = student(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, 1e-5)
    # Gradient accumulation: the Trainer hands over the number of labels in all its batches.
    scaled = student(ids, labels=labels, num_items_in_batch=40).loss
    assert_close(scaled, expected * labels[:, 1:].ne(-100).sum() / 40, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_or_not_as_configured(tied, tmp_path):
    student = make_student(tie_word_embeddings=tied)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied
    student.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = HydraHeadForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert student.get_output_embeddings() is student.lm_head
    assert student.get_input_embeddings() is student.model.embed_tokens
    student.resize_token_embeddings(VOCAB + 8)
    assert student(random_ids(1, 5)).logits.shape[-1] == VOCAB + 8


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
def test_gradient_checkpointing_changes_no_gradient(masks):
    plain, checkpointed = make_student(head_masks=masks).train(), make_student(head_masks=masks).train()
    checkpointed.gradient_checkpointing_enable()
    ids, mask = pad_rows(ROWS, "right", filler_seed=0)
    for model in (plain, checkpointed):
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert checkpointed.model.layers[0].gradient_checkpointing
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        assert one.grad is not None and torch.equal(one.grad, other.grad), name


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("fusion", ["scale", "gate", "concat"])
def test_every_parameter_is_trained(masks, fusion):
    student = make_student(head_masks=masks, fusion=fusion, attention_bias=True)
    student(random_ids(2, 9)).logits.square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.ne(0).any(), name


@pytest.mark.usefixtures("gradients")
def test_attention_dropout_acts_in_training_only():
    student, ids = make_student(attention_dropout=0.5), random_ids(2, 9)
    assert torch.equal(student(ids).logits, student(ids).logits)
    student.train()
    assert not torch.equal(student(ids).logits, student(ids).logits)


# -------------------------------------------------------------------------------------------------- precision


def bf16_error(model: torch.nn.Module, low: torch.nn.Module, ids: torch.Tensor) -> float:
    """Relative error of a model's logits in bf16 against itself in fp32."""
    exact = model(ids).logits
    return ((low(ids).logits.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-untied", "llama3-tied", "phi3"])
@pytest.mark.parametrize("fusion", ["scale", "gate", "concat"])
def test_bf16_costs_a_student_no_more_than_its_teacher(family, fusion, tmp_path):
    """The error depends on the weights, so the teacher's is the measure; 1.5 for the roundings that differ."""
    teacher, ids = make_teacher(family), random_ids(4, 60)
    student = convert_model(teacher, MIXED, calibration_ids=random_ids(4, 60, 1), fusion=fusion)
    student.save_pretrained(tmp_path / "student")
    low = HydraHeadForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    student_error = bf16_error(student, low, ids)
    teacher_error = bf16_error(teacher, bf16_teacher(family, tmp_path / "teacher"), ids)
    print(f"bf16 {family} {fusion}: student {student_error:.4f}, teacher {teacher_error:.4f}")
    assert student_error <= 1.5 * teacher_error, (student_error, teacher_error)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
def test_training_under_autocast_keeps_fp32_weights_and_finite_gradients(masks):
    student, ids = make_student(head_masks=masks, fusion="gate").train(), random_ids(2, 70)
    exact = student(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            assert student.generate(ids[:, :5], max_new_tokens=4, **NO_END).shape == (2, 9)
    # bf16 has 8 bits: 4e-3 for one rounding, a few of which add up in a loss that averages 138 tokens.
    assert (loss - exact).abs() <= 0.02 * exact.abs()
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("position", ["nope", "rope"])
def test_kernels_get_the_dtype_that_the_projections_gave_under_autocast(position, monkeypatch):
    """fp32 norms, convolution and rotations would promote q and k, and the recurrence would run in fp32."""
    student, ids = make_student(full_attention_position=position), random_ids(2, 9)
    seen = {"linear": set(), "full": set()}
    rule = modeling_hydrahead.gated_delta_rule

    def watched_rule(query, key, value, g, beta, *more):
        seen["linear"] |= {query.dtype, key.dtype, value.dtype}
        assert g.dtype == beta.dtype == torch.float32
        return rule(query, key, value, g, beta, *more)

    monkeypatch.setattr(modeling_hydrahead, "gated_delta_rule", watched_rule)
    for layer in student.model.layers:
        for block in [*layer.self_attn.full_attention.blocks, layer.self_attn.full_attention.whole]:
            block.register_forward_pre_hook(lambda _, args: seen["full"].update(each.dtype for each in args[:3]))
    cache = DynamicCache(config=student.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(ids, cache=cache, use_cache=True).logits.sum().backward()
    assert seen == {"linear": {torch.bfloat16}, "full": {torch.bfloat16}}
    assert all(layer.keys.dtype == layer.conv_states[0].dtype == torch.bfloat16 for layer in cache.layers)


def test_quantizers_leave_gates_and_the_fusion_alone():
    """Both ways in which transformers asks: by the name of a module, and (torchao) by the name of a parameter."""
    student = make_student(fusion="gate")
    linear = {name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linear if ".gates." in name or ".fusion." in name}
    assert len(kept) == 3 * LAYERS
    for suffix in ("", ".weight"):
        converted = {name for name in linear if should_convert_module(name + suffix, student._keep_in_fp32_modules)}
        assert converted == linear - kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", ["scale", "gate"])
def test_gates_and_fusion_stay_fp32_when_loaded_in_half_precision(dtype, fusion, tmp_path):
    make_student(fusion=fusion).save_pretrained(tmp_path)
    student = HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in student.named_parameters():
        fp32 = ".gates." in name or ".fusion." in name
        assert parameter.dtype == (torch.float32 if fp32 else dtype), name
    assert student(random_ids(2, 9)).logits.dtype == dtype
    output = student.generate(random_ids(2, 5), max_new_tokens=4, **NO_END)
    assert output.shape == (2, 9)


@pytest.mark.parametrize("masks", MASKS)
def test_the_recurrent_state_is_fp32_in_a_bf16_model(masks, tmp_path):
    make_student(head_masks=masks).save_pretrained(tmp_path)
    student = HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cache = DynamicCache(config=student.config)
    feed(student, random_ids(2, 9), [5, 1, 1, 1], cache)
    for layer in cache.layers:
        assert all(t.dtype == torch.float32 for t in getattr(layer, "recurrent_states", {}).values() if t is not None)


def test_no_parameter_is_a_scalar():
    """FSDP2 cannot shard one."""
    student = make_student(fusion="gate", attention_bias=True, attention_output_bias=True)
    assert all(parameter.ndim >= 1 for parameter in student.parameters())


# ----------------------------------------------------------------------------------------- kernels, compilation


def test_tensors_on_the_cpu_use_the_reference_even_where_fla_is_installed(monkeypatch):
    """transformers' own wrapper would take fla's kernels for them, which cannot run there."""

    def cannot_run(*args, **kwargs):
        raise RuntimeError("0 active drivers")

    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        monkeypatch.setattr(modeling_hydrahead, name, cannot_run)
    student = make_student()
    ids, positions = packed_rows()
    assert student.generate(random_ids(2, 5), max_new_tokens=3, **NO_END).shape == (2, 8)
    student(ids, position_ids=positions)


def test_a_broken_installation_of_the_kernels_is_named_on_a_gpu(monkeypatch, caplog):
    """A stand-in says that it lies on a GPU; the import itself is tried in a process of its own."""
    script = (
        "import importlib.abc, sys\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'fla': raise OSError('libz3.so: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from hydrahead import modeling_hydrahead as m\n"
        "print(m.chunk_gated_delta_rule, m.fla_error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "None OSError: libz3.so: cannot open shared object file", done.stderr

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(modeling_hydrahead, "chunk_gated_delta_rule", None)
    monkeypatch.setattr(modeling_hydrahead, "fla_error", "OSError: libz3.so")
    monkeypatch.setattr(modeling_hydrahead.logger, "propagate", True)
    q, k, v = (x.as_subclass(OnGpu) for x in torch.ones(3, 1, 4, 2, 8))
    modeling_hydrahead.gated_delta_rule(q, k, v, -torch.ones(1, 4, 2), torch.ones(1, 4, 2), None, False)
    assert "cannot be imported (OSError: libz3.so)" in caplog.text and "slow on a GPU" in caplog.text


@pytest.mark.parametrize("seq_len", [1, 9])
def test_every_number_of_heads_is_one_shape_to_the_gpu_kernels(seq_len, monkeypatch):
    """fla tunes for minutes where layers differ in their heads; stand-ins run the reference on what they are given."""
    shapes = []

    def stand_in(reference):
        def kernel(q, k, v, **more):
            shapes.append((q.shape[2], v.shape[2], more["g"].shape[2], more["initial_state"].shape[1]))
            return reference(q, k, v, **more)

        return kernel

    class OnGpu(torch.Tensor):
        is_cuda = True

    for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
        reference = getattr(modeling_hydrahead, "reference_" + name.removeprefix("fused_"))
        monkeypatch.setattr(modeling_hydrahead, name, stand_in(reference))
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, seq_len, 5, 8, generator=generator)
    g, beta = -torch.rand(2, seq_len, 5, generator=generator), torch.rand(2, seq_len, 5, generator=generator)
    state = torch.randn(2, 5, 8, 8, generator=generator)
    expected = modeling_hydrahead.gated_delta_rule(q, k, v, g, beta, state, True)
    found = modeling_hydrahead.gated_delta_rule(*(x.as_subclass(OnGpu) for x in (q, k, v)), g, beta, state, True)
    assert shapes == [(1, 1, 1, 1)]
    for one, other in zip(found, expected):
        assert_close(one.as_subclass(torch.Tensor), other, 1e-6)


def test_packed_rows_reach_the_gpu_kernel_as_one_row_with_bounds(monkeypatch):
    """fla's `cu_seqlens` path, with a stand-in that runs each sequence by the reference."""
    reference, seen = modeling_hydrahead.reference_chunk_gated_delta_rule, []

    def varlen(q, k, v, g, beta, use_qk_l2norm_in_kernel, cu_seqlens):
        assert q.shape[0] == q.shape[2] == g.shape[0] == g.shape[2] == 1  # one row, one head
        seen.append(cu_seqlens.tolist())
        pieces = [
            reference(*(x[:, a:b] for x in (q, k, v)), g=g[:, a:b], beta=beta[:, a:b], use_qk_l2norm_in_kernel=True)[0]
            for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:])
        ]
        return torch.cat(pieces, dim=1), None

    generator = torch.Generator().manual_seed(0)
    _, positions = packed_rows()
    q, k, v = torch.randn(3, 4, 17, HEADS, 8, generator=generator)
    g, beta = -torch.rand(4, 17, HEADS, generator=generator), torch.rand(4, 17, HEADS, generator=generator)
    packing = modeling_hydrahead.find_packing(positions, None, None, is_declared=False)
    slow = modeling_hydrahead._packed_gated_delta_rule(q, k, v, g, beta, packing, use_fla=False)
    monkeypatch.setattr(modeling_hydrahead, "chunk_gated_delta_rule", varlen)
    fast = modeling_hydrahead._packed_gated_delta_rule(q, k, v, g, beta, packing, use_fla=True)
    assert_close(fast, slow, 1e-5)
    assert seen[0][:6] == [0, 5, 6, 15, 17, 34] and seen[0][-1] == HEADS * 4 * 17


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masks", [MIXED, ALL_FULL, ALL_LINEAR])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_compiles_without_a_graph_break(masks, padded, fresh_dynamo):
    student = make_student(head_masks=masks)
    x = student.model.embed_tokens(random_ids(2, 9))
    positions = torch.arange(9)[None]
    inputs = {
        "position_embeddings": student.model.rotary_emb(x, positions),
        "query_scale": torch.ones(1, 9),
        "attention_mask": torch.ones(9, 9, dtype=torch.bool).tril()[None, None],
        "padding": modeling_hydrahead.Padding.of(torch.tensor([[0] * 3 + [1] * 6, [1] * 9]), 4) if padded else None,
    }
    layer = student.model.layers[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, **inputs), layer(x, **inputs))


@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR])
def test_a_decoding_step_of_a_layer_compiles_without_a_graph_break(masks, fresh_dynamo):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    caches = [make_cache("static", student) for _ in range(2)]
    for cache in caches:
        student(ids[:, :8], past_key_values=cache, use_cache=True)
    x = student.model.embed_tokens(ids[:, 8:])
    layer = student.model.layers[1]
    inputs = {
        "position_embeddings": student.model.rotary_emb(x, torch.tensor([[8]])),
        "query_scale": torch.ones(1, 1),
        "attention_mask": torch.arange(40).le(8)[None, None, None],
    }
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_close(compiled(x, cache=caches[0], **inputs), layer(x, cache=caches[1], **inputs))


@pytest.mark.slow
@pytest.mark.parametrize("masks", [MIXED, ALL_FULL])
def test_the_whole_model_compiles_to_the_same_logits(masks, fresh_dynamo):
    """In one graph, with and without positions, as transformers' own hybrids do."""
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    padded, mask = pad_rows(ROWS, "left", filler_seed=0)
    positions = torch.arange(9)[None] + 3
    expected = student(padded, attention_mask=mask).logits[mask.bool()]
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    assert_close(compiled(ids).logits, student(ids).logits)
    assert_close(compiled(ids, position_ids=positions).logits, student(ids, position_ids=positions).logits)
    assert_close(compiled(padded, attention_mask=mask).logits[mask.bool()], expected)
    counted = (mask.cumsum(1) - 1).clamp_min(0)  # as `generate` counts them
    assert_close(compiled(padded, attention_mask=mask, position_ids=counted).logits[mask.bool()], expected)


@pytest.mark.slow
def test_a_compiled_forward_keeps_packed_rows_apart_or_fails(fresh_dynamo):
    """It cannot look at positions: packing has to be declared, and what is not is noticed when the graph runs."""
    student = make_student()
    ids, positions = packed_rows([PACKED_LENGTHS[0]])
    bounds = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    declared = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    expected = student(ids, position_ids=positions).logits
    assert torch.equal(student(ids, position_ids=positions, **declared).logits, expected)
    compiled = torch.compile(student, backend="eager")
    assert_close(compiled(ids, position_ids=positions, use_cache=False, **declared).logits, expected)
    with pytest.raises(RuntimeError, match="needs cu_seq_lens_q"):
        compiled(ids, position_ids=positions, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [MIXED, ALL_FULL])
def test_the_model_exports_with_its_positions(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    inputs = {"input_ids": ids, "position_ids": torch.arange(9)[None], "use_cache": False}
    program = torch.export.export(student, (), inputs, strict=False)
    other = inputs | {"input_ids": random_ids(2, 9, seed=5)}
    assert_close(program.module()(**other).logits, student(**other).logits)


@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR])
def test_a_decoding_step_of_the_model_compiles_without_a_graph_break(masks, fresh_dynamo):
    """With position ids and a static cache, as `generate` compiles it on a GPU."""
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    cache = make_cache("static", student)
    student(ids[:, :8], past_key_values=cache, use_cache=True)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    step = compiled(ids[:, 8:], position_ids=torch.full((2, 1), 8), past_key_values=cache, use_cache=True)
    assert_close(step.logits, student(ids).logits[:, 8:])


# --------------------------------------------------------------------------------------------------- saving


SAVED = [
    {"head_masks": MIXED, "fusion": "gate"},
    {"head_masks": ALL_FULL, "fusion": "concat"},
    {"head_masks": ALL_LINEAR, "tie_word_embeddings": False},
    {"rope_parameters": LLAMA3_ROPE},
    {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}},
]


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_saving_what_was_loaded_gives_the_same_bytes(fields, tmp_path):
    student, ids = make_student(**fields), random_ids(2, 30)
    student.save_pretrained(tmp_path / "one")
    loaded = HydraHeadForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_buffers_that_are_not_saved_are_rebuilt_on_loading(fields, tmp_path):
    student = make_student(**fields)
    student.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: buffer for name, buffer in student.named_buffers() if name not in saved}
    assert any(name.endswith("fusion.index") for name in expected) and any("inv_freq" in name for name in expected)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = dict(HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_buffers())
        assert loaded.keys() == expected.keys()
        for name, buffer in expected.items():
            assert torch.equal(loaded[name], buffer), name


def test_the_decoder_alone_loads_from_a_language_model(tmp_path):
    student, ids = make_student(), random_ids(2, 9)
    student.save_pretrained(tmp_path)
    decoder = HydraHeadModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(ids).last_hidden_state, student.model(ids).last_hidden_state)


def test_a_saved_configuration_says_where_its_code_is(tmp_path):
    make_student().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "hydrahead"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_hydrahead.HydraHeadConfig",
        "AutoModel": "modeling_hydrahead.HydraHeadModel",
        "AutoModelForCausalLM": "modeling_hydrahead.HydraHeadForCausalLM",
    }
    for name in ("configuration_hydrahead.py", "modeling_hydrahead.py"):
        assert (tmp_path / name).is_file()


# ----------------------------------------------------------------------------------------------------- adapters


@pytest.mark.usefixtures("gradients")
def test_lora_on_all_linear_layers_trains_its_adapters_only_and_merges():
    student, ids = make_student(fusion="gate"), random_ids(2, 9)
    original = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    before = student(ids).logits.detach()
    model = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    for part in ("linear_attention.q_proj", "full_attention.output_gate", "self_attn.o_proj", "mlp.up_proj"):
        assert any(part in name for name in trainable), part
    assert_close(model(ids).logits, before, 1e-5)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(ids).logits.detach()
    assert (trained - before).abs().max() > 0.01
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, original[plain]), plain
    merged = model.merge_and_unload()
    assert type(merged) is HydraHeadForCausalLM
    assert_close(merged(ids).logits, trained)


@pytest.mark.usefixtures("gradients")
def test_the_fusion_can_be_trained_whole_beside_adapters(tmp_path):
    student, ids = make_student(), random_ids(2, 9)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["fusion"], task_type="CAUSAL_LM")
    model = get_peft_model(student, config)
    gamma = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("default.weight")]
    gamma = [p for p in gamma if p.shape == (HEADS,)]
    assert len(gamma) == LAYERS
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in gamma:
            assert parameter.grad.ne(0).any()
            parameter.mul_(1.5)
    expected = model(ids).logits.detach()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(make_student(), tmp_path)
    assert_close(loaded(ids).logits, expected, 1e-5)
    assert_close(model.merge_and_unload()(ids).logits, expected)
