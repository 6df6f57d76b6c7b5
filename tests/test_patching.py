"""Receivers, senders and comparators against whole forwards, on every family."""

from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload

from hydrahead.convert.hooks import Recording, record
from hydrahead.convert.scoring import senders
from hydrahead.convert.scoring.attribution import (
    attention_mass,
    attribution_effects,
    logit_contribution,
    query_key_effects,
)
from hydrahead.convert.scoring.readout import answer_positions, first_change, needle_positions, readout_direction
from hydrahead.convert.scoring.receivers import direct_effects, each_head_changed, output_change, receiver_effects
from hydrahead.convert.scoring.recompute import HeadReader
from hydrahead.convert.scoring.senders import HOPEFUL, PathPatching, sender_effects
from hydrahead.tests.counterfactuals import (
    frozen_attention_drop,
    make_pair,
    measured,
    null_pair,
    own_heads,
    path_drop,
    run,
)
from hydrahead.tests.families import FAMILIES, HEADS, LAYERS, bf16_teacher, make_teacher

ALL_HEADS = [(layer, head) for layer in range(3) for head in range(HEADS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_one_frozen_attention_forward_per_head(family):
    """1e-4 in logits: sums in another order."""
    teacher, pair = make_teacher(family), make_pair()
    found = receiver_effects(teacher, pair)
    assert found.drops.abs().max() > 1e-2 and abs(found.clean - found.corrupt) > 1e-2
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected = frozen_attention_drop(teacher, pair, layer, head)
            assert found.drops[layer, head].item() == pytest.approx(expected, abs=1e-4)


def test_a_null_patch_has_exactly_no_effect():
    teacher, pair = make_teacher("qwen3-tied"), null_pair(make_pair())
    found = receiver_effects(teacher, pair)
    assert found.clean == found.corrupt
    assert (found.drops == 0).all()
    patching = PathPatching(HeadReader(teacher), pair)
    assert (patching.effects(ALL_HEADS[:HEADS], [[(1, 0), (1, 3)]]) == 0).all()


def test_off_loaded_weights_give_the_same_effects():
    """Every parameter waits outside the model until its module runs."""
    pair = make_pair()
    expected = receiver_effects(make_teacher("qwen3-tied"), pair)
    teacher = make_teacher("qwen3-tied")
    senders = PathPatching(HeadReader(teacher), pair).effects(ALL_HEADS[:HEADS], [[(1, 0), (1, 3)]])
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in teacher.parameters())
    torch.testing.assert_close(receiver_effects(teacher, pair).drops, expected.drops, rtol=0, atol=1e-6)
    found = PathPatching(HeadReader(teacher), pair).effects(ALL_HEADS[:HEADS], [[(1, 0), (1, 3)]])
    torch.testing.assert_close(found, senders, rtol=0, atol=1e-6)


@torch.no_grad()
def test_replay_under_bf16_weights_carries_the_stream_in_fp32(tmp_path):
    """
    Against the replay of the same recordings by the same rounded weights in fp32: what is left is the rounding of
    what MLPs and `W_o` write, 4% of the largest effect here, and less than the error of a bf16 forward per head.
    """
    pair, rounded = make_pair(), bf16_teacher("qwen3-tied", tmp_path)
    exact = type(rounded).from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = receiver_effects(rounded, pair).drops
    assert found.dtype == torch.float32
    clean, corrupt = (record(rounded, ids, answer_positions(pair)) for ids in (pair.clean, pair.corrupt))
    changes = {
        index: (
            index * HEADS,
            output_change(
                layer,
                each_head_changed(clean.heads[index], corrupt.heads[index]).float(),
                clean.heads[index].float(),
                torch.float32,
            ),
        )
        for index, layer in enumerate(exact.model.layers)
    }
    clean = Recording(*(getattr(clean, name).float() for name in ("heads", "attention", "residual", "states")))
    expected = direct_effects(exact, clean, changes, readout_direction(exact, pair)).view(LAYERS, HEADS)
    error = (found - expected).abs()
    assert error.max() < 0.04 * expected.abs().max()
    naive = [[frozen_attention_drop(rounded, pair, layer, head) for head in range(HEADS)] for layer in range(LAYERS)]
    assert error.mean() < (torch.tensor(naive) - expected).abs().mean()


@torch.no_grad()
def test_readout_discounts_later_tokens_and_ignores_shared_ones():
    teacher, pair = make_teacher("llama3-tied"), make_pair()
    logits = teacher(torch.tensor([pair.clean])).logits[0]
    total, weight = 0.0, 0.0
    for j, (right, wrong) in enumerate(zip(pair.answer, pair.wrong)):
        if right != wrong:
            row = logits[pair.answer_start - 1 + j]
            total, weight = total + 0.9**j * float(row[right] - row[wrong]), weight + 0.9**j
    assert receiver_effects(teacher, pair).clean == pytest.approx(total / weight, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recomputed_head_is_the_models_own(family):
    """Projections, biases, norms, rotation and grouped keys of every family: 1e-5 in fp32."""
    teacher, pair = make_teacher(family), make_pair()
    heads, _, inputs, _ = run(teacher, pair.clean)
    reader, everywhere = HeadReader(teacher).for_length(len(pair.clean)), slice(0, len(pair.clean))
    some = [0, 2, 3, 5]
    for layer in range(LAYERS):
        query = reader.project(layer, "q", some, inputs[layer][:, 4:9], slice(4, 9))
        key, value = reader.keys_values(layer, some, inputs[layer], everywhere)
        found = reader.attend(query, key, value, slice(4, 9))[0]
        torch.testing.assert_close(found, heads[layer, 4:9][:, some], rtol=0, atol=1e-5)
    torch.testing.assert_close(own_heads(teacher, 1, inputs[1]), heads[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3-tied", "llama-bias", "phi3-longrope", "qwen2-untied"])
@pytest.mark.parametrize(
    "hops",
    [
        [[(2, 0), (2, 4)]],
        [[(1, 1), (2, 2), (2, 3)]],  # receivers in two layers; those below may not feed those above
        [[(1, 0), (1, 5)], [(2, 1), (2, 2)]],  # senders of senders
    ],
)
def test_path_patching_equals_the_naive_oracle(family, hops):
    """1e-4 in logits, every sender below the last receiver, three layers."""
    teacher, pair = make_teacher(family, num_hidden_layers=3), make_pair()
    found = PathPatching(HeadReader(teacher), pair).effects(ALL_HEADS, hops)
    assert found.abs().max() > 1e-3
    reach = max(layer for layer, _ in hops[0])
    for sender, drop in zip(ALL_HEADS, found.tolist()):
        expected = path_drop(teacher, pair, sender, hops) if sender[0] < reach else 0.0
        assert drop == pytest.approx(expected, abs=1e-4), sender


def test_senders_do_not_depend_on_their_order_or_batch(monkeypatch):
    teacher, pair = make_teacher("qwen3-tied", num_hidden_layers=3), make_pair()
    patching, hops = PathPatching(HeadReader(teacher), pair), [[(2, 0), (2, 4)]]
    expected = patching.effects(ALL_HEADS[:12], hops)
    monkeypatch.setattr("hydrahead.convert.scoring.senders.TOKENS_AT_ONCE", 40)  # two senders at a time
    found = patching.effects(ALL_HEADS[:12][::-1], hops).flip(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_estimates_are_the_slope_of_the_exact_effect():
    """A hundredth of the change has, within 2%, a hundredth of its estimate's effect."""
    teacher, pair = make_teacher("llama3-tied", num_hidden_layers=3), make_pair()
    patching, hops = PathPatching(HeadReader(teacher), pair), [[(1, 0)], [(2, 1), (2, 2)]]
    estimate = patching.estimate(hops)
    patching.corrupt.heads = torch.lerp(patching.clean.heads.double(), patching.corrupt.heads.double(), 1e-2).float()
    found = patching.effects(ALL_HEADS, hops).view(3, HEADS) * 1e2
    largest = found.abs().max()
    assert largest > 1e-4
    assert (found - estimate).abs().max() < 0.02 * largest


def test_senders_of_senders_are_found_round_by_round_and_the_shortlist_keeps_the_largest():
    teacher, pair = make_teacher("qwen3-tied", num_hidden_layers=3), make_pair()
    reader, receivers = HeadReader(teacher), [(2, 0), (2, 4)]
    scale = 0.1
    first = PathPatching(reader, pair).effects(ALL_HEADS[:12], [receivers]).view(2, HEADS) / scale
    one_round = sender_effects(reader, [pair], [scale], receivers, threshold=0.01, rounds=1)[0]
    torch.testing.assert_close(one_round[:2], first.clamp_min(0), rtol=0, atol=1e-5)
    assert (one_round[2] == 0).all()
    new = [head for head in ALL_HEADS[:12] if one_round[head] > 0.01]
    assert any(layer == 1 for layer, _ in new), "the second round needs a sender in layer 1"
    second = PathPatching(reader, pair).effects(ALL_HEADS[:HEADS], [new, receivers]) / scale
    two_rounds = sender_effects(reader, [pair], [scale], receivers, threshold=0.01, rounds=2)[0]
    torch.testing.assert_close(two_rounds[0], torch.maximum(one_round[0], second), rtol=0, atol=1e-5)

    short = sender_effects(reader, [pair], [scale], receivers, threshold=0.01, rounds=1, shortlist=4)[0]
    estimate = PathPatching(reader, pair).estimate([receivers])[:2].abs()
    kept = estimate.flatten().argsort(descending=True)[:4]
    assert set(short.flatten().nonzero().flatten().tolist()) <= set(kept.tolist())
    torch.testing.assert_close(short[:2].flatten()[kept], one_round[:2].flatten()[kept], rtol=0, atol=1e-5)
    # As many, but that all others' estimates are below a tenth of the threshold.
    high = estimate.flatten()[kept[1]].item() / scale / HOPEFUL
    short = sender_effects(reader, [pair], [scale], receivers, threshold=high, rounds=1, shortlist=4)[0]
    assert set(short.flatten().nonzero().flatten().tolist()) <= {kept[0].item()}
    torch.testing.assert_close(short[:2].flatten()[kept[:1]], one_round[:2].flatten()[kept[:1]], rtol=0, atol=1e-5)
    assert (sender_effects(reader, [pair], [scale], [], threshold=0.01) == 0).all()


@pytest.mark.parametrize("room", [0.25, 0.0])
def test_pairs_are_recorded_once_where_there_is_room_and_tell_the_same(room, monkeypatch):
    """Of two lengths, which rotate on their own."""
    teacher, pairs, recorded = make_teacher("qwen3-tied", num_hidden_layers=3), [make_pair(), make_pair()], []
    shorter = {"clean": pairs[1].clean[2:], "corrupt": pairs[1].corrupt[2:], "answer_start": pairs[1].answer_start - 2}
    pairs[1] = replace(pairs[1], **shorter)
    reader, receivers = HeadReader(teacher), [(2, 0), (2, 4)]
    alone = [sender_effects(reader, [pair], [0.1], receivers, threshold=1e-6) for pair in pairs]
    monkeypatch.setattr(senders, "record", lambda *args, **kwargs: recorded.append(1) or record(*args, **kwargs))
    monkeypatch.setattr(senders._Recorded, "ROOM", room)
    found = sender_effects(reader, pairs, [0.1, 0.1], receivers, threshold=1e-6)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)
    assert len(recorded) == (4 if room else 8), "two rounds"


def test_path_patching_without_receivers_is_refused():
    with pytest.raises(ValueError, match="at least one hop"):
        PathPatching(HeadReader(make_teacher("qwen3-tied")), make_pair()).effects([(0, 0)], [])


def test_attribution_is_the_slope_of_the_total_effect():
    """Against the finite difference of a whole forward with a head moved a hundredth of the way, 3% of the largest."""
    teacher, pair = make_teacher("mistral"), make_pair()
    found = attribution_effects(teacher, pair)
    clean_heads, *_, states = run(teacher, pair.clean)
    corrupt_heads, *_ = run(teacher, pair.corrupt)
    moved = torch.lerp(clean_heads, corrupt_heads, 1e-2)
    for layer, head in [(0, 0), (0, 3), (1, 1), (1, 4)]:
        mask = torch.zeros(len(pair.clean), HEADS, dtype=torch.bool)
        mask[:, head] = True
        *_, patched = run(teacher, pair.clean, {layer: (moved[layer], mask)})
        drop = (measured(teacher, pair, states) - measured(teacher, pair, patched)) * 1e2
        assert found[layer, head].item() == pytest.approx(drop, abs=0.03 * found.abs().max().item())


def test_query_key_correction_equals_attribution_where_only_values_change():
    """In layer 0 with equal queries and keys the value node is the head's whole change; nodes of no change give 0."""
    teacher, pair = make_teacher("llama-bias"), make_pair()
    with torch.no_grad():
        for layer in teacher.model.layers:
            for kind in ("q_proj", "k_proj"):
                getattr(layer.self_attn, kind).weight.zero_()
    found, expected = query_key_effects(HeadReader(teacher), pair), attribution_effects(teacher, pair)
    torch.testing.assert_close(found, expected.clamp_min(0), rtol=0, atol=1e-4)


@torch.no_grad()
def test_attention_mass_is_what_the_models_own_attention_gives():
    teacher, pair = make_teacher("qwen3-tied"), make_pair()
    teacher.set_attn_implementation("eager")
    attentions = teacher(torch.tensor([pair.clean]), output_attentions=True).attentions
    needle = needle_positions(pair)
    expected = torch.stack([a[0][:, answer_positions(pair)][..., needle].sum(-1).mean(-1) for a in attentions])
    torch.testing.assert_close(attention_mass(HeadReader(teacher), pair), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_logit_contribution_counts_only_tokens_that_the_teacher_gets_right():
    """An oracle from eager attention weights and values; the right tokens are whatever the teacher would write."""
    teacher, pair = make_teacher("llama-bias"), make_pair()
    assert (logit_contribution(HeadReader(teacher), pair) == 0).all(), "this teacher gets none of the tokens right"
    written = teacher(torch.tensor([pair.clean])).logits[0, answer_positions(pair)].argmax(-1).tolist()
    pair = type(pair)(pair.clean, pair.corrupt, pair.answer_start, [written[0], *pair.answer[1:]], pair.wrong)
    found = logit_contribution(HeadReader(teacher), pair)

    teacher.set_attn_implementation("eager")
    output = teacher(torch.tensor([pair.clean]), output_attentions=True)
    needle, query = needle_positions(pair), pair.answer_start - 1
    direction = teacher.lm_head.weight[written[0]] * teacher.model.norm.weight
    others = [i for i in range(len(pair.clean)) if i not in needle]
    *_, inputs, _ = run(teacher, pair.clean)
    for layer, head in [(0, 1), (1, 4)]:
        attention = teacher.model.layers[layer].self_attn
        values = attention.v_proj(teacher.model.layers[layer].input_layernorm(inputs[layer]))[0]
        values = values.unflatten(-1, (2, -1))[:, head // 3]
        weight = attention.o_proj.weight.unflatten(1, (HEADS, -1))[:, head]
        written_by = output.attentions[layer][0, head, query] * (values @ weight.T @ direction)
        expected = written_by[needle].sum() - len(needle) * written_by[others].mean()
        assert found[layer, head].item() == pytest.approx(float(expected), abs=1e-4)


def test_the_first_change_is_where_the_texts_part():
    pair = make_pair()
    assert first_change(pair) == 8 and first_change(null_pair(pair)) == pair.answer_start - 1
    assert readout_direction(make_teacher("qwen3-tied"), pair)[1].abs().max() == 0
