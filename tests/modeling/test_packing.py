"""Packed rows: sequences side by side never see each other."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hydrahead import modeling_hydrahead
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, HEADS, MIXED, make_student, random_ids, random_masks
from hydrahead.tests.modeling.checks import (
    MASKS,
    PACKED_LENGTHS,
    PACKING_TOLERANCE,
    ROWS,
    assert_close,
    packed_rows,
    pad_rows,
)


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
