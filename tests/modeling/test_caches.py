"""Caches: pieces, resets, counts and reordering."""

import inspect

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hydrahead.tests.families import ALL_LINEAR, HEADS, make_student, random_ids, random_masks
from hydrahead.tests.modeling.checks import MASKS, assert_close, feed, make_cache


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    "sizes", [[12] + [1] * 8, [1] * 20, [2, 1, 3, 1, 1, 2], [3, 3, 3, 3, 3], [7, 5, 1, 7], [4, 5, 11], [20]], ids=str
)
def test_prefill_chunks_and_steps_equal_one_forward(masks, kind, sizes):
    student, ids = make_student(head_masks=masks), random_ids(2, 20)
    assert_close(feed(student, ids, sizes, make_cache(kind, student)), student(ids).logits)


@pytest.mark.parametrize("masks", MASKS)
def test_a_later_chunk_of_a_prompt_makes_no_mask_against_all_before_it(masks, monkeypatch):
    """At 512K tokens it was the largest tensor of all. With padding there is one still, and for other kernels."""
    student, ids, shapes = make_student(head_masks=masks), random_ids(2, 20), []
    module = inspect.getmodule(type(student))
    make = module.create_causal_mask

    def watched(*arguments):
        shapes.append(arguments[1].shape[1])
        return make(*arguments)

    expected = student(ids).logits
    monkeypatch.setattr(module, "create_causal_mask", watched)
    for mask in (None, torch.ones_like(ids)):
        assert_close(feed(student, ids, [12, 5, 3], DynamicCache(config=student.config), mask), expected)
    has_full = student.config.full_attention_share > 0
    assert shapes == ([12, 12] if has_full else [])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    alone = student(ids[:1, 4:]).logits[0]
    del shapes[:]
    padded = feed(student, ids, [12, 5, 3], DynamicCache(config=student.config), mask)
    assert_close(padded[0, 4:], alone)
    student.set_attn_implementation("eager")
    assert_close(feed(student, ids, [12, 5, 3], DynamicCache(config=student.config)), expected)
    assert shapes == ([12, 5, 3] * 2 if has_full else [])


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
