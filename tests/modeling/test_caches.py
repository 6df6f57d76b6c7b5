"""Caches: pieces, resets, counts and reordering."""

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
