"""Padding: on either side or between tokens, it changes nothing."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hydrahead.tests.families import ALL_LINEAR, MIXED, make_student, random_ids, random_masks
from hydrahead.tests.modeling.checks import MASKS, NO_END, ROWS, assert_close, feed, make_cache, pad_rows, states


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
