"""The choice of heads: strategies, budgets, what the user asks for, and what it costs."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrahead import HydraHeadConfig
from hydrahead.convert import HeadScores, select_heads
from hydrahead.convert.masks import Exchange, describe_choice, select_to_file
from hydrahead.convert.scoring.evidence import ranking
from hydrahead.convert.selection import BY_SCORE, STRATEGIES, same_cache_in_other_unit, selection_cost
from hydrahead.serving.heads import Pages
from hydrahead.tests.families import student_fields


def random_scores(seed: int) -> HeadScores:
    """Of 4 layers of 8 heads, two of which share a KV head."""
    return make_scores(torch.rand(4, 8, generator=torch.Generator().manual_seed(seed)).tolist(), kv_heads=4)


def make_scores(scores: list[list[float]], kv_heads: int = 2) -> HeadScores:
    ties = [[float(head) for head in range(len(row))] for row in scores]
    return HeadScores(scores, ties, kv_heads, [], {}, "test", "test")


SCORES = make_scores([[0.9, 0.8, 0, 0], [0.7, 0, 0, 0.6], [0.0, 0, 0, 0.1]])


def test_global_takes_the_best_and_breaks_ties_as_the_scores_say():
    assert select_heads(SCORES, 3 / 12, budget_unit="heads") == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert select_heads(make_scores([[0, 0, 0, 0]] * 2), 2 / 8, budget_unit="heads") == [[0, 0, 0, 1]] * 2


def test_constrained_gives_every_layer_its_best_head_first():
    assert select_heads(SCORES, 4 / 12, "global-constrained", "heads") == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_kv_groups_are_kept_whole_by_the_sum_of_their_heads():
    masks = select_heads(SCORES, 2 / 6, "global", budget_unit="kv_groups")
    assert masks == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("strategy", BY_SCORE)
def test_what_is_dropped_may_leave_no_whole_share_for_every_process(strategy):
    """Seven heads of eight are left in each layer, for two processes six: the budget of 28 is not reached."""
    dropped = [(layer, 0) for layer in range(4)]
    masks = select_heads(random_scores(0), 28 / 32, strategy, "heads", drop=dropped, tensor_parallel=2)
    assert [sum(row) for row in masks] == [6] * 4 and not any(row[0] for row in masks)


@given(
    unit=st.sampled_from(["heads", "kv_groups"]),
    ratio=st.sampled_from([0.125, 0.25, 0.5, 0.6, 1.0]),
    processes=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_an_even_choice_gives_no_layer_more_than_its_share_and_is_the_best_of_those(unit, ratio, processes, seed):
    """Nothing that is left out scores more than what its layer, or one that has room, has."""
    scores, size = random_scores(seed), 2 if unit == "kv_groups" else 1
    masks = select_heads(scores, ratio, "global-even", unit, tensor_parallel=processes)
    budget = round(ratio * 32 / size)
    counts, most = [sum(row) // size for row in masks], math.ceil(math.ceil(budget / 4) / processes) * processes
    assert max(counts) <= most and budget - processes < sum(counts) <= budget
    values = [[sum(row[i : i + size]) for i in range(0, 8, size)] for row in scores.scores]
    kept = [[value for value, full in zip(row, mask[::size]) if full] for row, mask in zip(values, masks)]
    out = [[value for value, full in zip(row, mask[::size]) if not full] for row, mask in zip(values, masks)]
    assert all(max(left, default=0) <= min(held, default=9) for left, held in zip(out, kept))
    if processes == 1:
        with_room = [max(left, default=0) for left, count in zip(out, counts) if count < most]
        assert max(with_room, default=0) <= min(min(held, default=9) for held in kept)


def test_layerwise_keeps_whole_layers():
    masks = select_heads(make_scores([[0.0] * 4] * 8), 0.25, "layerwise")
    assert [sum(row) for row in masks] == [0, 0, 0, 4, 0, 0, 0, 4]


@given(
    strategy=st.sampled_from(list(STRATEGIES)),
    unit=st.sampled_from(["heads", "kv_groups"]),
    ratio=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=250)  # all there are
def test_every_strategy_keeps_its_budget_and_looks_at_nothing_but_scores_or_seed(strategy, unit, ratio, seed):
    masks = select_heads(random_scores(0), ratio, strategy, unit, seed)
    assert sum(map(sum, masks)) == round(ratio * 32)
    if unit == "kv_groups":
        assert all(row[head] == row[head + 1] for row in masks for head in range(0, 8, 2))
    if strategy in BY_SCORE:
        assert masks == select_heads(random_scores(0), ratio, strategy, unit, seed + 1)
    else:
        assert masks == select_heads(random_scores(1), ratio, strategy, unit, seed)


@pytest.mark.parametrize("unit", ["heads", "kv_groups"])
def test_scores_decide_where_they_should_and_dice_where_they_should(unit):
    def choices(strategy, scores, seeds):
        return {str(select_heads(random_scores(i), 0.5, strategy, unit, j)) for i, j in zip(scores, seeds)}

    for strategy in BY_SCORE:
        assert len(choices(strategy, scores=range(4), seeds=[0] * 4)) == 4
    for strategy in ("layer-random", "global-random"):
        assert len(choices(strategy, scores=[0] * 4, seeds=range(4))) == 4
    for strategy in ("fixed", "layerwise"):
        assert len(choices(strategy, scores=range(4), seeds=range(4))) == 1


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


@pytest.mark.parametrize(
    ("ratio", "strategy", "works"),
    [(0.25, "global-constrained", 0.334), (0.25, "layer", 0.334), (0.001, "global", 0.012)],
)
def test_a_ratio_that_is_too_small_is_told_which_one_works(ratio, strategy, works):
    """30 layers of 3 KV heads: a quarter of them is fewer than there are layers."""
    scores = make_scores([[0.1] * 9] * 30, kv_heads=3)
    with pytest.raises(ValueError, match=f"choose a ratio of {works} or more") as refused:
        select_heads(scores, ratio, strategy, "kv_groups")
    assert sum(map(sum, select_heads(scores, works, strategy, "kv_groups"))) >= 3
    with pytest.raises(ValueError, match="needs at least"):
        select_heads(scores, works - 0.01, strategy, "kv_groups")
    if strategy != "global":
        assert str(refused.value).endswith("or the strategy global")
        assert sum(map(sum, select_heads(scores, ratio, "global", "kv_groups"))) == 22 * 3


def test_a_head_without_a_score_is_refused_by_name_until_its_fate_is_said():
    scores = make_scores([[0.9, math.nan, 0, 0], [0.7, 0, math.nan, 0.6]])
    for unit in ("heads", "kv_groups"):
        with pytest.raises(ValueError, match=r"^head 0\.1 and 1 more heads have no score, [^\n]*$"):
            select_heads(scores, 0.5, "global", unit)
    wishes = {"keep": [(0, 1)], "drop": [(1, 2)]}
    masks = select_heads(scores, 0.5, "global", "heads", **wishes)
    assert masks == [[1, 1, 0, 0], [1, 0, 0, 1]]
    assert selection_cost(scores, masks, 16).without_evidence == 1
    assert same_cache_in_other_unit(scores, masks, "global", "heads")[0] == "kv_groups"
    assert sum(map(sum, select_heads(scores, 0.5, "global-random", "heads"))) == 4, (
        "the controls do not look at scores"
    )


@pytest.mark.parametrize(
    ("masks", "heads"),
    [
        ([[1] * 4 + [0] * 4] + [[1] * 2 + [0] * 6] * 3, 8),  # four layers, two KV heads in the fullest
        ([[1] * 6 + [0] * 2] + [[0] * 8] * 3, 4),  # three, which four are not divided by
        ([[1] * 2 + [0] * 6] * 4, 4),
        ([[0] * 8] * 4, 0),
    ],
)
def test_a_choice_says_what_vllm_makes_of_uneven_layers(masks, heads):
    scores = random_scores(0)
    scores.head_dim = 32
    config = HydraHeadConfig(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=32, head_masks=masks
    )
    cost, pages = selection_cost(scores, masks), Pages.of(config)
    assert cost.padded_kv_bytes_per_token == heads * 128 == pages.kv_bytes_per_token
    said = "\n".join(describe_choice(scores, masks, "global", "kv_groups"))
    assert ("in vLLM" in said) == (pages.kv_bytes_per_token > pages.kv_bytes_needed)


def test_kept_heads_that_nothing_speaks_for_are_counted():
    scores = make_scores([[0.9, -0.1, 0, 0], [0.7, -0.3, -0.2, 0.6]])
    masks = select_heads(scores, 6 / 8, "global", "heads")
    assert masks == [[1, 1, 1, 1], [1, 0, 0, 1]]
    assert selection_cost(scores, masks, 16).without_evidence == 3
    scores.head_dim = 16
    said = "\n".join(describe_choice(scores, masks, "global", "heads"))
    assert "warning: 3 of the 6 heads score 0 or less" in said
    assert "0 or less" not in "\n".join(describe_choice(scores, [[1, 0, 0, 0], [1, 0, 0, 1]], "global", "heads"))


def test_kept_and_dropped_heads_have_the_last_word():
    masks = select_heads(SCORES, 3 / 12, "global", "heads", keep=[(2, 0)], drop=[(0, 0)])
    assert masks == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    groups = select_heads(SCORES, 2 / 6, "global", "kv_groups", keep=[(2, 0)])
    assert groups == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    layer = select_heads(SCORES, 3 / 12, "layer", "heads", drop=[(0, 0), (0, 1)])
    assert [sum(row) for row in layer] == [1, 1, 1] and layer[0][:2] == [0, 0]


@given(
    strategy=st.sampled_from(BY_SCORE),
    unit=st.sampled_from(["heads", "kv_groups"]),
    processes=st.sampled_from([1, 2, 4]),
    ratio=st.sampled_from([0.5, 0.6, 0.75, 1.0]),
    keep=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=2),
)
def test_tensor_parallel_layers_hold_equal_shares_within_the_budget(strategy, unit, processes, ratio, keep):
    """Refused exactly where the smallest equal shares that hold what is kept are more than the budget."""
    size = 2 if unit == "kv_groups" else 1
    budget = round(ratio * 32 / size)
    kept = [len({head // size for where, head in keep if where == layer}) for layer in range(4)]
    least = [max(math.ceil(count / processes), STRATEGIES[strategy].every_layer) * processes for count in kept]
    wanted = {"keep": keep, "tensor_parallel": processes}
    if sum(least) > budget:
        with pytest.raises(ValueError, match=r"^the budget of [^\n]* cannot give layers multiples of [^\n]*$"):
            select_heads(random_scores(0), ratio, strategy, unit, **wanted)
        return
    masks = select_heads(random_scores(0), ratio, strategy, unit, **wanted)
    counts = [sum(row) // size for row in masks]
    assert all(masks[layer][head] for layer, head in keep)
    assert budget - processes < sum(counts) <= budget
    assert all(count % processes == 0 for count in counts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": [(0, 9)]}, "head 9 of layer 0 does not exist"),
        ({"keep": [(0, 1)], "drop": [(0, 1)]}, "both to be kept and to be dropped"),
        ({"keep": [(0, 1)], "strategy": "fixed"}, "need a strategy by score"),
        ({"ratio": 1 / 4, "keep": [(0, h) for h in range(4)]}, "which does not fit"),
        ({"ratio": 0.9, "drop": [(0, 0), (0, 1)], "strategy": "global"}, "which does not fit"),
        (
            {"ratio": 1 / 4, "keep": [(0, 2), (0, 3)], "strategy": "global-constrained"},
            "needs a head in each of 3 layers",
        ),
        ({"tensor_parallel": 3}, "cannot be shared by 3 processes"),
        ({"keep": [(0, 0), (0, 1), (0, 2)], "strategy": "global-even"}, "no layer more than 2 units"),
        (
            {"keep": [(0, 0), (0, 1), (0, 2)], "strategy": "global-even", "tensor_parallel": 2},
            "no layer more than 2 units",
        ),
        ({"ratio": 1 / 4, "tensor_parallel": 2, "strategy": "global-constrained"}, "multiples of 2"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        select_heads(SCORES, **{"ratio": 0.5, "budget_unit": "heads"} | arguments)


@pytest.mark.parametrize(
    "asked", [{"strategy": "layer"}, {"strategy": "global-even"}, {"strategy": "global", "tensor_parallel": 2}]
)
def test_exchanges_that_would_undo_the_strategy_are_refused(asked, tmp_path):
    with pytest.raises(ValueError, match=r"^greedy exchange moves heads between layers: it cannot keep [^\n]*$"):
        select_to_file(
            [tmp_path / "none.json"],
            tmp_path / "masks.json",
            0.25,
            budget_unit="heads",
            exchange=Exchange("demo", forms=tmp_path / "forms.safetensors"),
            **asked,
        )


def test_the_cost_of_a_choice_is_what_the_models_config_says():
    scores = make_scores([[0.0] * 6] * 2)
    masks = [[1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 0]]
    cost, config = selection_cost(scores, masks, head_dim=16), HydraHeadConfig(**student_fields(head_masks=masks))
    assert (cost.kv_heads, cost.all_kv_heads) == (3, 4)
    assert cost.kv_bytes_per_token == config.kv_bytes_per_token()
    assert cost.state_bytes == config.state_bytes()
    with pytest.raises(ValueError, match="pass head_dim"):
        selection_cost(scores, masks)


def test_heads_that_no_score_sets_apart_are_counted():
    assert selection_cost(SCORES, select_heads(SCORES, 3 / 12, "global", "heads"), 16).decided_by_tie_break == 0
    assert selection_cost(SCORES, select_heads(SCORES, 7 / 12, "global", "heads"), 16).decided_by_tie_break == 2


def test_the_same_cache_buys_more_heads_in_groups_and_fewer_groups_in_heads():
    heads = select_heads(SCORES, 3 / 12, "global", "heads")  # two KV heads of layer 0 and 1, 3 query heads
    unit, groups = same_cache_in_other_unit(SCORES, heads, "global", "heads")
    assert unit == "kv_groups" and sum(map(sum, groups)) == 4
    unit, back = same_cache_in_other_unit(SCORES, groups, "global", "kv_groups")
    assert unit == "heads"
    assert selection_cost(SCORES, back, 16).kv_heads <= selection_cost(SCORES, groups, 16).kv_heads
    assert sum(map(sum, back)) == 3


def test_a_head_without_a_score_ranks_last_whatever_stands_beside_it():
    scores = [[0.1, math.nan, 0.3, -0.2]]
    for order in itertools.permutations(range(4)):
        shuffled = [[scores[0][i] for i in order]]
        ranked = [shuffled[0][head] for _, head in ranking(shuffled, [[0.0] * 4])]
        assert ranked[:3] == [0.3, 0.1, -0.2] and math.isnan(ranked[3])


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 3])
def test_a_ratio_is_a_share_of_the_kv_cache_if_nothing_else_is_said(ratio):
    scores = HeadScores.drawn(30, 9, 3)  # the heads of SmolLM2-135M
    masks = select_heads(scores, ratio)
    cost = selection_cost(scores, masks, 64)
    assert cost.kv_bytes_per_token / cost.teacher_kv_bytes_per_token == pytest.approx(ratio, abs=0.5 / 90)
    assert masks == select_heads(scores, ratio, "global", "kv_groups")
    single = HeadScores.drawn(30, 9, 9)  # without shared keys a group is a head
    assert select_heads(single, ratio) == select_heads(single, ratio, budget_unit="heads")
