"""From head scores to head masks, under a budget of heads or of KV cache."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the table of strategies is read for help, without NumPy
    from .scoring.scores import HeadScores

BUDGET_UNITS = ("heads", "kv_groups")
CONVOLUTION = 4  # tokens: the default of `HydraHeadConfig.short_conv_kernel_size`, which needs PyTorch to be read

Masks = list[list[int]]
Head = tuple[int, int]
"""Layer and query head."""
Unit = tuple[int, int]
"""Layer, and a head of it or a KV group."""


@dataclass(frozen=True)
class Candidates:
    """
    What a strategy chooses from.

    Attributes:
        values: `[L][units]`, score and tie-break of each head or KV group.
        ratio: share of them that stays full attention.
        kept, dropped: those that must, and must not.
        seed: of random choices.
    """

    values: list[list[tuple[float, float]]]
    ratio: float
    kept: set[Unit]
    dropped: set[Unit]
    seed: int

    @cached_property
    def all(self) -> list[Unit]:
        """All units, layer by layer."""
        return [(layer, unit) for layer, row in enumerate(self.values) for unit in range(len(row))]

    @property
    def budget(self) -> int:
        """How many stay full attention."""
        return round(self.ratio * len(self.all))

    @cached_property
    def layers(self) -> list[list[Unit]]:
        """The units of each layer, best first."""
        return [self.ranked((layer, unit) for unit in range(len(row))) for layer, row in enumerate(self.values)]

    @cached_property
    def shares(self) -> list[int]:
        """The budget divided among the layers, as equally as it goes."""
        share, rest = divmod(self.budget, len(self.values))
        return [share + (layer < rest) for layer in range(len(self.values))]

    def ranked(self, units: Iterable[Unit]) -> list[Unit]:
        """Units from the best to the worst: kept ones first, dropped ones not at all."""
        free = (unit for unit in units if unit not in self.dropped)
        return sorted(free, key=lambda unit: (unit in self.kept, *self.values[unit[0]][unit[1]]), reverse=True)


def _global(candidates: Candidates) -> list[Unit]:
    return candidates.ranked(candidates.all)[: candidates.budget]


def _constrained(candidates: Candidates) -> list[Unit]:
    best = [row[0] for row in candidates.layers if row]
    forced = candidates.kept | set(best)
    if len(best) < len(candidates.layers) or len(forced) > candidates.budget:
        raise ValueError(
            f"global-constrained needs a head in each of {len(candidates.layers)} layers beside what is kept: "
            f"{len(forced)} of {candidates.budget}"
        )
    others = (unit for unit in candidates.ranked(candidates.all) if unit not in forced)
    return [*forced, *others][: candidates.budget]


OVER_SHARE = "global-even gives no layer more than {} units; keep or drop ask other"


def _even(candidates: Candidates) -> list[Unit]:
    most, counts, chosen = max(candidates.shares), [0] * len(candidates.values), []
    for unit in candidates.ranked(candidates.all):
        if len(chosen) < candidates.budget and counts[unit[0]] < most:
            counts[unit[0]] += 1
            chosen.append(unit)
    if not candidates.kept <= set(chosen) or len(chosen) < candidates.budget:
        raise ValueError(OVER_SHARE.format(most))
    return chosen


def _layer(candidates: Candidates) -> list[Unit]:
    shares = candidates.shares
    chosen = [unit for row, count in zip(candidates.layers, shares) for unit in row[:count]]
    if not candidates.kept <= set(chosen) or len(chosen) < candidates.budget:
        raise ValueError(f"layer gives each layer {min(shares)} to {max(shares)} units; keep or drop ask other")
    return chosen


def _fixed(candidates: Candidates) -> list[Unit]:
    return [(layer, unit) for layer, count in enumerate(candidates.shares) for unit in range(count)]


def _layer_random(candidates: Candidates) -> list[Unit]:
    rng, units = random.Random(candidates.seed), range(len(candidates.values[0]))
    return [(layer, unit) for layer, count in enumerate(candidates.shares) for unit in rng.sample(units, count)]


def _global_random(candidates: Candidates) -> list[Unit]:
    return random.Random(candidates.seed).sample(candidates.all, candidates.budget)


def _layerwise(candidates: Candidates) -> list[Unit]:
    layers = len(candidates.values)
    count = max(1, round(candidates.ratio * layers))
    full_layers = {round((index + 1) * layers / count) - 1 for index in range(count)}
    return [unit for unit in candidates.all if unit[0] in full_layers]


class Strategy(NamedTuple):
    """
    A way to choose: its function, its line of help, whether scores decide, whether every layer gets its own, and
    whether none gets more than its equal share.
    """

    choose: Callable[[Candidates], list[Unit]]
    about: str
    by_score: bool = False
    every_layer: bool = False
    bounded: bool = False


STRATEGIES = {
    "global": Strategy(_global, "the best of all layers", by_score=True),
    "global-constrained": Strategy(_constrained, "the same, one per layer at least", by_score=True, every_layer=True),
    "global-even": Strategy(
        _even, "the same, no layer more than its equal share, rounded up", by_score=True, bounded=True
    ),
    "layer": Strategy(_layer, "the best of each layer, equally many", by_score=True, every_layer=True),
    "fixed": Strategy(_fixed, "control: the same places in each layer", every_layer=True),
    "layer-random": Strategy(_layer_random, "control: at random, equally many of each layer", every_layer=True),
    "global-random": Strategy(_global_random, "control: at random"),
    "layerwise": Strategy(_layerwise, "control: whole layers, evenly spaced"),
}
BY_SCORE = tuple(name for name, strategy in STRATEGIES.items() if strategy.by_score)


def select_heads(
    scores: "HeadScores",
    ratio: float,
    strategy: str = "global",
    budget_unit: str = "kv_groups",
    seed: int = 0,
    *,
    keep: Iterable[Head] = (),
    drop: Iterable[Head] = (),
    tensor_parallel: int = 1,
) -> Masks:
    """
    Choose the heads that stay full attention (docs/method.md §2). `scores.tie_break` orders heads of equal score.

    Args:
        ratio: share of KV groups (or query heads) that stay full attention, in (0, 1].
        strategy: a name in `STRATEGIES`.
        budget_unit: `"kv_groups"` chooses whole KV groups by the sum of their heads' scores, so that `ratio` is also
            the share of the KV cache that is kept; `"heads"` counts query heads, as the paper does.
        seed: of the random controls.
        keep, drop: (layer, head) that must be, or must not be, full attention, whatever their score; in KV groups the
            head's whole group. Kept ones count towards the budget.
        tensor_parallel: every layer's number of full-attention units becomes a multiple of this, so that as many
            processes can hold equal shares; the budget is met as nearly as that allows, never exceeded.

    Returns:
        masks `[L][H]`, 1 for full attention.

    Raises:
        ValueError: an unknown strategy or unit, a head that does not exist, is both kept and dropped or has no score,
            or a budget that leaves no head, cannot give each layer one, or cannot hold what is to be kept.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if budget_unit not in BUDGET_UNITS:
        raise ValueError(f"budget_unit must be one of {', '.join(BUDGET_UNITS)}, got {budget_unit!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    heads = [list(zip(*rows)) for rows in zip(scores.scores, scores.tie_break)]
    width = len(heads[0])
    size = width // scores.num_key_value_heads if budget_unit == "kv_groups" else 1
    values = [[tuple(map(sum, zip(*row[start : start + size]))) for start in range(0, width, size)] for row in heads]
    kept, dropped = (_units_of(heads_, len(heads), width, size) for heads_ in (keep, drop))
    candidates = Candidates(values, ratio, kept, dropped, seed)

    by_score = STRATEGIES[strategy].by_score
    if (kept or dropped or tensor_parallel > 1) and not by_score:
        raise ValueError(f"keep, drop and tensor parallelism need a strategy by score ({', '.join(BY_SCORE)})")
    _check_budget(candidates, strategy, budget_unit, size)
    if by_score:
        _check_measured(scores.scores, kept | dropped, size)
    if tensor_parallel > 1:
        full = set(_in_multiples(candidates, tensor_parallel, strategy))
    else:
        full = set(STRATEGIES[strategy].choose(candidates))
    return [[int((layer, head // size) in full) for head in range(width)] for layer in range(len(heads))]


def _units_of(heads: Iterable[Head], layers: int, width: int, size: int) -> set[Unit]:
    """The units that some heads belong to."""
    units = set()
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < width):
            raise ValueError(f"head {head} of layer {layer} does not exist: {layers} layers of {width} heads")
        units.add((layer, head // size))
    return units


def _check_budget(candidates: Candidates, strategy: str, budget_unit: str, size: int) -> None:
    """Refuse a budget under which the strategy cannot choose, or that cannot hold what is to be kept and dropped."""
    kept, dropped, ratio = candidates.kept, candidates.dropped, candidates.ratio
    if kept & dropped:
        layer, unit = min(kept & dropped)
        raise ValueError(f"head {unit * size} of layer {layer} is both to be kept and to be dropped")
    budget, count = candidates.budget, len(candidates.all)
    least = len(candidates.values) if STRATEGIES[strategy].every_layer else 1
    if budget < least:
        works = -(-least * 1000 // count) / 1000  # rounded up, as it is printed
        other = "global" if STRATEGIES[strategy].by_score else "global-random"
        raise ValueError(
            f"ratio {ratio:g} keeps {budget} of {count} {budget_unit}, {strategy} needs at least {least}: "
            f"choose a ratio of {works:g} or more" + (f", or the strategy {other}" if budget else "")
        )
    if len(kept) > budget or count - len(dropped) < budget:
        raise ValueError(
            f"ratio {ratio} keeps {budget} of {count} {budget_unit}: {len(kept)} are to be kept and {len(dropped)} to "
            "be dropped, which does not fit"
        )


def _check_measured(scores: list[list[float]], decided: set[Head], size: int) -> None:
    """Refuse scores that are no number, unless the user has decided about their heads."""
    unknown = [
        f"{layer}.{head}"
        for layer, row in enumerate(scores)
        for head, score in enumerate(row)
        if math.isnan(score) and (layer, head // size) not in decided
    ]
    if unknown:
        more = f" and {len(unknown) - 1} more heads have" if len(unknown) > 1 else " has"
        raise ValueError(
            f"head {unknown[0]}{more} no score, an effect was not finite: keep or drop by name, or score again in fp32"
        )


def _in_multiples(candidates: Candidates, multiple: int, strategy: str) -> list[Unit]:
    """The best bundles of `multiple` units of a layer, each layer's taken in the order of their rank."""
    values, rows, budget = candidates.values, candidates.layers, candidates.budget
    if len(values[0]) % multiple:
        raise ValueError(f"{len(values[0])} units per layer cannot be shared by {multiple} processes")
    counts = [-(-sum(unit in candidates.kept for unit in row) // multiple) * multiple for row in rows]
    if STRATEGIES[strategy].every_layer:
        counts = [max(count, multiple) for count in counts]
    bounded = STRATEGIES[strategy].bounded
    most = -(-max(candidates.shares) // multiple) * multiple if bounded else len(values[0])
    if max(counts) > most:
        raise ValueError(OVER_SHARE.format(most))
    if sum(counts) > budget or any(count > len(row) for count, row in zip(counts, rows)):
        raise ValueError(
            f"the budget of {budget} cannot give layers multiples of {multiple}: {sum(counts)} are needed"
        )

    def worth(layer: int) -> tuple[float, ...]:
        bundle = rows[layer][counts[layer] : counts[layer] + multiple]
        return tuple(map(sum, zip(*(values[layer][unit] for _, unit in bundle))))

    while sum(counts) + multiple <= budget:
        open_layers = [layer for layer, row in enumerate(rows) if counts[layer] + multiple <= min(most, len(row))]
        if not open_layers:  # what is to be dropped leaves no whole bundle
            break
        if strategy == "layer":
            fewest = min(counts[layer] for layer in open_layers)
            open_layers = [layer for layer in open_layers if counts[layer] == fewest]
        counts[max(open_layers, key=worth)] += multiple
    return [unit for row, count in zip(rows, counts) for unit in row[:count]]


@dataclass(frozen=True)
class SelectionCost:
    """
    What a choice keeps and costs, in bf16 for the cache, as a student's config counts it.

    Attributes:
        full_attention_heads, heads: query heads that stay, and all.
        kv_heads, all_kv_heads: KV heads that are cached, and all.
        kv_bytes_per_token, teacher_kv_bytes_per_token: cache growth with each token.
        padded_kv_bytes_per_token: the least in vLLM, where layers with a cache all keep as many KV heads as the one
            with most, rounded up to a divisor of the teacher's (`serving.heads.Pages` has all of it).
        state_bytes: constant state of a sequence: recurrent states in fp32, the convolution's inputs in bf16.
        decided_by_tie_break: heads that stay although no score sets them above one that does not.
        without_evidence: heads that stay although their score is not above 0: no more speaks for them than against.
    """

    full_attention_heads: int
    heads: int
    kv_heads: int
    all_kv_heads: int
    kv_bytes_per_token: int
    teacher_kv_bytes_per_token: int
    padded_kv_bytes_per_token: int
    state_bytes: int
    decided_by_tie_break: int
    without_evidence: int


def selection_cost(scores: "HeadScores", masks: Masks, head_dim: int | None = None) -> SelectionCost:
    """
    What a choice keeps and costs (docs/method.md §1).

    Raises:
        ValueError: the score file does not say the head size, and none is given.
    """
    dim = head_dim or scores.head_dim
    if dim is None:
        raise ValueError("the score file does not hold the head size; pass head_dim")
    group = len(masks[0]) // scores.num_key_value_heads
    of_layers = [sum(any(row[start : start + group]) for start in range(0, len(row), group)) for row in masks]
    kv_heads, fullest = sum(of_layers), max(of_layers)
    total = scores.num_key_value_heads
    even = next(count for count in range(max(fullest, 1), total + 1) if total % count == 0)
    full = [score for row, mask in zip(scores.scores, masks) for score, kept in zip(row, mask) if kept]
    linear = [score for row, mask in zip(scores.scores, masks) for score, kept in zip(row, mask) if not kept]
    all_kv = len(masks) * total
    bytes_per_kv_head = 2 * dim * 2
    return SelectionCost(
        full_attention_heads=len(full),
        heads=len(full) + len(linear),
        kv_heads=kv_heads,
        all_kv_heads=all_kv,
        kv_bytes_per_token=kv_heads * bytes_per_kv_head,
        teacher_kv_bytes_per_token=all_kv * bytes_per_kv_head,
        padded_kv_bytes_per_token=sum(map(bool, of_layers)) * even * bytes_per_kv_head,
        state_bytes=len(linear) * dim * (4 * dim + 3 * CONVOLUTION * 2),
        decided_by_tie_break=sum(score in set(linear) for score in full),
        without_evidence=sum(not score > 0 for score in full),
    )


def same_cache_in_other_unit(scores: "HeadScores", masks: Masks, strategy: str, budget_unit: str) -> tuple[str, Masks]:
    """
    What the KV bytes of a choice would buy under the other budget unit.

    In KV groups: as many groups as the choice in heads pins. In heads: the largest budget whose heads pin no more KV
    heads than the groups are.

    Returns:
        the other unit, and its masks.
    """
    cost = selection_cost(scores, masks, head_dim=1)
    known = [[0.0 if math.isnan(score) else score for score in row] for row in scores.scores]  # heads are only counted
    scores = replace(scores, scores=known)
    if budget_unit == "heads":
        return "kv_groups", select_heads(scores, cost.kv_heads / cost.all_kv_heads, strategy, "kv_groups")
    for budget in range(cost.full_attention_heads, 0, -1):
        try:
            trial = select_heads(scores, budget / cost.heads, strategy, "heads")
        except ValueError:
            break
        if selection_cost(scores, trial, head_dim=1).kv_heads <= cost.kv_heads:
            return "heads", trial
    return "heads", masks
