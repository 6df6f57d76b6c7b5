"""Generation: greedy, sampled, in beams, from a cache, in continuous batches; and what is refused."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import StaticLayer

from hydrahead.ops_hydrahead import EVEN
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, LAYERS, MIXED, VOCAB, make_student, random_ids
from hydrahead.tests.modeling.checks import MASKS, NO_END, assert_close


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


def test_caches_without_a_place_for_a_recurrent_state_are_refused():
    student, ids = make_student(), random_ids(1, 6)
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        student.generate(ids, cache_implementation="quantized", max_new_tokens=4, **NO_END)
    with pytest.raises(ValueError, match="non linear attention layer"):
        student(ids, past_key_values=DynamicCache(), use_cache=True)


@pytest.mark.parametrize("masks", MASKS)
def test_generation_from_embeddings_equals_generation_from_ids(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    from_embeddings = student.generate(inputs_embeds=student.model.embed_tokens(ids), max_new_tokens=8, **NO_END)
    assert torch.equal(from_embeddings, student.generate(ids, max_new_tokens=8, **NO_END)[:, 6:])


STEP = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
INSIDE = {"output_attentions": True, "output_hidden_states": True}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}])
def test_generation_gives_out_what_each_step_saw(masks, options):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    student.set_attn_implementation("eager")
    rows = 2 * options.get("num_beams", 1)
    output = student.generate(ids, max_new_tokens=4, **NO_END | STEP | INSIDE | options)
    steps = len(output.logits)
    assert output.sequences.shape[1] <= 6 + steps and len(output.scores) == steps
    assert all(each.shape == (rows, VOCAB) for each in (*output.scores, *output.logits))
    counts = [sum(row) for row in masks if any(row)]
    for step, (attentions, hidden) in enumerate(zip(output.attentions or [()] * steps, output.hidden_states)):
        queries, keys = (1 if step else 6), 6 + step
        assert [tuple(each.shape) for each in attentions] == [(rows, count, queries, keys) for count in counts]
        assert [tuple(each.shape) for each in hidden] == [(rows, queries, student.config.hidden_size)] * (LAYERS + 1)
    if not options:  # each row's own logits, not another beam's
        for step, logits in enumerate(output.logits):
            assert_close(logits, student(output.sequences[:, : 6 + step]).logits[:, -1])


def test_several_samples_of_one_prompt_begin_with_it():
    student, ids = make_student(), random_ids(2, 6)
    options = NO_END | {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5}
    for more in ({}, {"num_beams": 4}):
        output = student.generate(ids, **options, **more)
        assert output.shape == (6, 11) and torch.equal(output[:, :6], ids.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("masks", MASKS)
def test_generation_begins_with_the_first_token_where_there_is_no_prompt(masks):
    student = make_student(head_masks=masks)
    bos = torch.tensor([[student.config.bos_token_id]])
    assert torch.equal(student.generate(max_new_tokens=5, **NO_END), student.generate(bos, max_new_tokens=5, **NO_END))


@pytest.mark.parametrize("masks", MASKS)
def test_positions_given_are_positions_counted(masks):
    student, ids = make_student(head_masks=masks, full_attention_position="rope"), random_ids(2, 6)
    expected = student.generate(ids, max_new_tokens=5, **NO_END)
    positions = torch.arange(6)[None]
    assert torch.equal(student.generate(ids, position_ids=positions, max_new_tokens=5, **NO_END), expected)
    ones = torch.ones_like(ids)
    assert torch.equal(student.generate(ids, attention_mask=ones, max_new_tokens=5, **NO_END), expected)


@pytest.mark.parametrize("masks", MASKS)
def test_embeddings_begin_a_generation_that_goes_on_or_has_a_static_cache(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    embeddings = student.model.embed_tokens(ids)
    options = NO_END | {"max_new_tokens": 6}
    expected = student.generate(ids, **options)[:, 6:]
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(student.generate(inputs_embeds=embeddings, **static, **options), expected)
    first = student.generate(inputs_embeds=embeddings, **NO_END | {"max_new_tokens": 3}, return_dict_in_generate=True)
    turn = torch.cat([embeddings, student.model.embed_tokens(first.sequences)], dim=1)
    rest = student.generate(
        inputs_embeds=turn, past_key_values=first.past_key_values, **NO_END | {"max_new_tokens": 3}
    )
    assert torch.equal(torch.cat([first.sequences, rest], dim=1), expected)


@pytest.mark.parametrize("masks", MASKS)
def test_a_static_cache_has_a_length_that_a_compiled_step_divides(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, EVEN)
    static = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
    options = NO_END | {"max_new_tokens": 5}
    for prompt, length in ((ids[:, :6], EVEN), (ids, 2 * EVEN)):
        found = student.generate(prompt, **static, **options)
        assert torch.equal(found.sequences, student.generate(prompt, **options))
        layers = [layer for layer in found.past_key_values.layers if isinstance(layer, StaticLayer)]
        assert {layer.keys.shape[2] for layer in layers} == {length}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("padding", [0, 2])
def test_a_prompt_reads_itself_and_not_the_room_of_a_static_cache(masks, padding, monkeypatch):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(query, key, *args, attn_mask=None, **kwargs):
        seen.add((query.shape[2], key.shape[2], None if attn_mask is None else attn_mask.shape[-1]))
        return attend(query, key, *args, attn_mask=attn_mask, **kwargs)

    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = NO_END | {"max_new_tokens": 4, "attention_mask": mask}
    expected = student.generate(ids, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    static = student.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)
    prompts = {each for each in seen if each[0] == 6}
    assert all(keys == 6 and columns == (6 if padding else None) for _, keys, columns in prompts)
    assert bool(prompts) == student.model.has_full_attention


@pytest.mark.parametrize("masks", MASKS)
def test_guidance_keeps_a_cache_of_its_own(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    options = NO_END | {"max_new_tokens": 6, "guidance_scale": 1.5, "negative_prompt_ids": random_ids(2, 3, seed=5)}
    guided = student.generate(ids, **options)
    assert torch.equal(guided, student.generate(ids, use_cache=False, **options))
    assert not torch.equal(guided, student.generate(ids, **options | {"guidance_scale": 1.0}))
