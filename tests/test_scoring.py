"""Receiver scores against one full forward per head, score files, and the choice of heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydrahead.convert import HeadScores, score_heads, select_heads
from hydrahead.convert.patching import readout_direction, receiver_effects
from hydrahead.convert.probes import Pair, Probe
from hydrahead.convert.selection import STRATEGIES
from hydrahead.tests.families import FAMILIES, HEADS, KV_HEADS, LAYERS, make_teacher, random_ids


def make_pair(seed: int = 0, answer_tokens: int = 3) -> Pair:
    """Two random texts that differ in three tokens, with an answer whose middle token both share."""
    clean, answer, wrong = (random_ids(1, n, seed + i)[0].tolist() for i, n in enumerate((24, answer_tokens, 3)))
    wrong = wrong[:answer_tokens]
    if answer_tokens > 2:
        wrong[1] = answer[1]
    corrupt = [*clean[:8], *((token + 7) % 90 + 3 for token in clean[8:11]), *clean[11:]]
    return Pair(clean + answer, corrupt + answer, len(clean), answer, wrong)


@torch.no_grad()
def frozen_attention_drop(model, pair: Pair, layer: int, head: int) -> float:
    """The oracle: a forward over all tokens, a head's output taken from the corrupt text, later attention frozen."""
    dim = model.model.layers[0].self_attn.o_proj.in_features // HEADS
    direction = readout_direction(model, pair)
    positions = slice(pair.answer_start - 1, pair.answer_start - 1 + len(pair.answer))

    def run(ids, patch=None, freeze=None):
        seen, outputs, hooks = [], [], []
        for index, block in enumerate(model.model.layers):

            def before(_, args, index=index):
                states = args[0].clone()
                if patch is not None and index == layer:
                    states[..., head * dim : (head + 1) * dim] = patch[..., head * dim : (head + 1) * dim]
                seen.append(states)
                return (states,)

            def after(_, args, output, index=index):
                outputs.append(output)
                return freeze[index] if freeze is not None and index > layer else None

            projection = block.self_attn.o_proj
            hooks += [projection.register_forward_pre_hook(before), projection.register_forward_hook(after)]
        states = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        return float((states[0, positions].float() * direction).sum()), seen, outputs

    clean, _, clean_outputs = run(pair.clean)
    _, corrupt_seen, _ = run(pair.corrupt)
    patched, _, _ = run(pair.clean, patch=corrupt_seen[layer], freeze=clean_outputs)
    return clean - patched


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_one_frozen_attention_forward_per_head(family):
    """1e-4 in logits: sums in another order."""
    teacher, pair = make_teacher(family), make_pair()
    drops, clean, corrupt = receiver_effects(teacher, pair)
    assert drops.abs().max() > 1e-2 and abs(clean - corrupt) > 1e-2
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected = frozen_attention_drop(teacher, pair, layer, head)
            assert drops[layer, head].item() == pytest.approx(expected, abs=1e-4)


def test_a_null_patch_has_exactly_no_effect():
    pair = make_pair()
    same = Pair(pair.clean, pair.clean, pair.answer_start, pair.answer, pair.wrong)
    drops, clean, corrupt = receiver_effects(make_teacher("qwen3-tied"), same)
    assert clean == corrupt
    assert drops.abs().max() < 1e-5


@torch.no_grad()
def test_readout_discounts_later_tokens_and_ignores_shared_ones():
    teacher, pair = make_teacher("llama3-tied"), make_pair()
    logits = teacher(torch.tensor([pair.clean])).logits[0]
    total, weight = 0.0, 0.0
    for j, (right, wrong) in enumerate(zip(pair.answer, pair.wrong)):
        if right != wrong:
            row = logits[pair.answer_start - 1 + j]
            total, weight = total + 0.9**j * float(row[right] - row[wrong]), weight + 0.9**j
    _, clean, _ = receiver_effects(teacher, pair)
    assert clean == pytest.approx(total / weight, abs=1e-4)


def usable_pairs(teacher, count: int) -> tuple[Pair, ...]:
    """Pairs on which a random teacher's readout happens to fall under corruption."""
    pairs = (make_pair(seed) for seed in range(0, 4000, 10))
    usable = (pair for pair in pairs if (effect := receiver_effects(teacher, pair))[1] - effect[2] > 0.2)
    return tuple(next(usable) for _ in range(count))


def test_scores_are_scaled_counted_and_survive_a_file(tmp_path):
    teacher = make_teacher("qwen3-tied")
    good = usable_pairs(teacher, 3)
    null = Pair(good[0].clean, good[0].clean, good[0].answer_start, good[0].answer, good[0].wrong)
    probes = [Probe("a", "retrieval", (*good, null)), Probe("b", "copying", good[:1])]
    scores = score_heads(teacher, None, probes)
    assert [(probe.used, probe.dropped) for probe in scores.probes] == [(3, 1), (1, 0)]
    for capability in scores.capabilities.values():
        assert max(map(max, capability)) == pytest.approx(1) and min(map(min, capability)) == 0
    assert scores.num_key_value_heads == KV_HEADS
    scores.save(tmp_path / "scores.json")
    assert HeadScores.load(tmp_path / "scores.json") == scores


def test_a_probe_that_tells_nothing_apart_and_a_broken_file_are_refused(tmp_path):
    teacher, pair = make_teacher("qwen3-tied"), make_pair()
    null = Pair(pair.clean, pair.clean, pair.answer_start, pair.answer, pair.wrong)
    with pytest.raises(ValueError, match=r"^needles: the teacher tells none of its 1 pairs apart[^\n]*$"):
        score_heads(teacher, None, [Probe("needles", "retrieval", (null,))])
    with pytest.raises(ValueError, match="no probes"):
        score_heads(teacher, None, [])
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match="not a head score file"):
        HeadScores.load(tmp_path / "scores.json")


def make_scores(scores: list[list[float]], kv_heads: int = 2) -> HeadScores:
    ties = [[float(head) for head in range(len(row))] for row in scores]
    return HeadScores(scores, ties, kv_heads, [], {}, "test", "test")


SCORES = make_scores([[0.9, 0.8, 0, 0], [0.7, 0, 0, 0.6], [0.0, 0, 0, 0.1]])


def test_global_takes_the_best_and_breaks_ties_as_the_scores_say():
    assert select_heads(SCORES, 3 / 12, "global") == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert select_heads(make_scores([[0, 0, 0, 0]] * 2), 2 / 8, "global") == [[0, 0, 0, 1]] * 2


def test_constrained_gives_every_layer_its_best_head_first():
    assert select_heads(SCORES, 4 / 12, "global-constrained") == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_kv_groups_are_kept_whole_by_the_sum_of_their_heads():
    masks = select_heads(SCORES, 2 / 6, "global", budget_unit="kv_groups")
    assert masks == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_layerwise_keeps_whole_layers():
    masks = select_heads(make_scores([[0.0] * 4] * 8), 0.25, "layerwise")
    assert [sum(row) for row in masks] == [0, 0, 0, 4, 0, 0, 0, 4]


@given(
    strategy=st.sampled_from(STRATEGIES),
    unit=st.sampled_from(["heads", "kv_groups"]),
    ratio=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 3),
)
def test_every_strategy_keeps_its_budget(strategy, unit, ratio, seed):
    masks = select_heads(make_scores(torch.rand(4, 8).tolist(), kv_heads=4), ratio, strategy, unit, seed)
    assert sum(map(sum, masks)) == round(ratio * 32)
    assert masks == select_heads(make_scores(torch.rand(4, 8).tolist(), kv_heads=4), ratio, strategy, unit, seed) or (
        strategy in ("global", "global-constrained", "layer")
    )
    if unit == "kv_groups":
        assert all(row[head] == row[head + 1] for row in masks for head in range(0, 8, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5, "strategy": "best"}, "strategy must be one of"),
        ({"ratio": 0.5, "budget_unit": "bytes"}, "budget_unit must be one of"),
        ({"ratio": 1.5}, "ratio must be in"),
        ({"ratio": 0.01, "strategy": "global"}, "needs at least 1"),
        ({"ratio": 1 / 12, "strategy": "layer"}, "needs at least 3"),
    ],
)
def test_impossible_budgets_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        select_heads(SCORES, **arguments)
