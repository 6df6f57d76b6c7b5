"""From head scores to head masks, under a budget of heads or of KV cache."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .scoring.scores import HeadScores

STRATEGIES = ("global", "global-constrained", "layer", "fixed", "layer-random", "global-random", "layerwise")
BUDGET_UNITS = ("heads", "kv_groups")
BY_SCORE = ("global", "global-constrained", "layer")
CONVOLUTION = 4  # tokens: the default of `HydraHeadConfig.short_conv_kernel_size`, which needs PyTorch to be read

Masks = list[list[int]]
Head = tuple[int, int]


def select_heads(
    scores: HeadScores,
    ratio: float,
    strategy: str = "global-constrained",
    budget_unit: str = "heads",
    seed: int = 0,
    *,
    keep: Iterable[Head] = (),
    drop: Iterable[Head] = (),
    tensor_parallel: int = 1,
) -> Masks:
    """
    Choose the heads that stay full attention (METHOD §2).

    Strategies: `global` (the best of all layers), `global-constrained` (the same, but at least one per layer), `layer`
    (the best of each layer, equally many), and the controls `fixed` (the same places in each layer), `layer-random`,
    `global-random` and `layerwise` (whole layers, evenly spaced). `scores.tie_break` orders heads of equal score.

    Args:
        ratio: share of query heads (or KV groups) that stay full attention, in (0, 1].
        budget_unit: `"heads"` counts query heads; `"kv_groups"` chooses whole KV groups by the sum of their heads'
            scores, so that `ratio` is also the share of the KV cache that is kept.
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
    # A unit is a head or a KV group: (score, tie-break) for each place [layer][unit].
    heads = [list(zip(*rows)) for rows in zip(scores.scores, scores.tie_break)]
    size = len(heads[0]) // scores.num_key_value_heads if budget_unit == "kv_groups" else 1
    units = [[tuple(map(sum, zip(*row[start : start + size]))) for start in range(0, len(row), size)] for row in heads]
    layers, per_layer = len(units), len(units[0])
    places = [(layer, unit) for layer in range(layers) for unit in range(per_layer)]
    budget = round(ratio * len(places))
    kept, dropped = (_units(heads_, layers, per_layer * size, size) for heads_ in (keep, drop))
    if kept & dropped:
        layer, unit = min(kept & dropped)
        raise ValueError(f"head {unit * size} of layer {layer} is both to be kept and to be dropped")
    if (kept or dropped or tensor_parallel > 1) and strategy not in BY_SCORE:
        raise ValueError(f"keep, drop and tensor parallelism need a strategy by score ({', '.join(BY_SCORE)})")
    needs_all_layers = strategy not in ("global", "global-random", "layerwise")
    if budget < 1 or (needs_all_layers and budget < layers):
        least = layers if needs_all_layers else 1
        works = -(-least * 1000 // len(places)) / 1000  # rounded up, as it is printed
        other = "global" if strategy in BY_SCORE else "global-random"
        raise ValueError(
            f"ratio {ratio:g} keeps {budget} of {len(places)} {budget_unit}, {strategy} needs at least {least}: "
            f"choose a ratio of {works:g} or more" + (f", or the strategy {other}" if budget else "")
        )
    if strategy in BY_SCORE:
        _check_measured(scores.scores, kept | dropped, size)
    if len(kept) > budget or len(places) - len(dropped) < budget:
        raise ValueError(
            f"ratio {ratio} keeps {budget} of {len(places)} {budget_unit}: {len(kept)} are to be kept and "
            f"{len(dropped)} to be dropped, which does not fit"
        )

    def rank(candidates: Iterable[Head]) -> list[Head]:
        free = (place for place in candidates if place not in dropped)
        return sorted(free, key=lambda place: (place in kept, *units[place[0]][place[1]]), reverse=True)

    rng = random.Random(seed)
    share = [budget // layers + (layer < budget % layers) for layer in range(layers)]
    rows = [rank((layer, unit) for unit in range(per_layer)) for layer in range(layers)]
    if tensor_parallel > 1:
        chosen = _in_multiples(rows, units, kept, budget, tensor_parallel, strategy)
    elif strategy == "global":
        chosen = rank(places)[:budget]
    elif strategy == "global-constrained":
        best = [row[0] for row in rows if row]
        forced = kept | set(best)
        if len(best) < layers or len(forced) > budget:
            raise ValueError(
                f"{strategy} needs a head in each of {layers} layers beside what is kept: {len(forced)} of {budget}"
            )
        chosen = [*forced, *(place for place in rank(places) if place not in forced)][:budget]
    elif strategy == "layer":
        chosen = [place for row, count in zip(rows, share) for place in row[:count]]
        if not kept <= set(chosen) or len(chosen) < budget:
            raise ValueError(
                f"layer gives each layer {min(share)} to {max(share)} {budget_unit}; keep or drop ask other"
            )
    elif strategy == "fixed":
        chosen = [(layer, unit) for layer in range(layers) for unit in range(share[layer])]
    elif strategy == "layer-random":
        chosen = [(layer, unit) for layer in range(layers) for unit in rng.sample(range(per_layer), share[layer])]
    elif strategy == "global-random":
        chosen = rng.sample(places, budget)
    else:
        count = max(1, round(ratio * layers))
        full_layers = {round((index + 1) * layers / count) - 1 for index in range(count)}
        chosen = [place for place in places if place[0] in full_layers]

    full = set(chosen)
    return [[int((layer, head // size) in full) for head in range(per_layer * size)] for layer in range(layers)]


def _units(heads: Iterable[Head], layers: int, width: int, size: int) -> set[Head]:
    """The units that some heads belong to."""
    units = set()
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < width):
            raise ValueError(f"head {head} of layer {layer} does not exist: {layers} layers of {width} heads")
        units.add((layer, head // size))
    return units


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


def _in_multiples(rows, units, kept: set[Head], budget: int, multiple: int, strategy: str) -> list[Head]:
    """The best bundles of `multiple` units of a layer, each layer's taken in the order of their rank."""
    if len(units[0]) % multiple:
        raise ValueError(f"{len(units[0])} units per layer cannot be shared by {multiple} processes")
    counts = [-(-sum(place in kept for place in row) // multiple) * multiple for row in rows]
    if strategy != "global":
        counts = [max(count, multiple) for count in counts]
    if sum(counts) > budget or any(count > len(row) for count, row in zip(counts, rows)):
        raise ValueError(
            f"the budget of {budget} cannot give layers multiples of {multiple}: {sum(counts)} are needed"
        )
    while sum(counts) + multiple <= budget:

        def worth(layer: int) -> tuple[float, float]:
            bundle = rows[layer][counts[layer] : counts[layer] + multiple]
            scores, ties = zip(*(units[place[0]][place[1]] for place in bundle))
            return sum(scores), sum(ties)

        open_layers = [layer for layer, row in enumerate(rows) if counts[layer] + multiple <= len(row)]
        if strategy == "layer":
            fewest = min(counts[layer] for layer in open_layers)
            open_layers = [layer for layer in open_layers if counts[layer] == fewest]
        counts[max(open_layers, key=worth)] += multiple
    return [place for row, count in zip(rows, counts) for place in row[:count]]


@dataclass(frozen=True)
class SelectionCost:
    """
    What a choice keeps and costs, in bf16 for the cache, as a student's config counts it.

    Attributes:
        full_attention_heads, heads: query heads that stay, and all.
        kv_heads, all_kv_heads: KV heads that are cached, and all.
        kv_bytes_per_token, teacher_kv_bytes_per_token: cache growth with each token.
        state_bytes: constant state of a sequence: recurrent states in fp32, the convolution's inputs in bf16.
        decided_by_tie_break: heads that stay although no score sets them above one that does not.
        without_evidence: heads that stay although their score is not above 0: nothing measured speaks for them.
    """

    full_attention_heads: int
    heads: int
    kv_heads: int
    all_kv_heads: int
    kv_bytes_per_token: int
    teacher_kv_bytes_per_token: int
    state_bytes: int
    decided_by_tie_break: int
    without_evidence: int


def selection_cost(scores: HeadScores, masks: Masks, head_dim: int | None = None) -> SelectionCost:
    """
    What a choice keeps and costs (METHOD §1).

    Raises:
        ValueError: the score file does not say the head size, and none is given.
    """
    dim = head_dim or scores.head_dim
    if dim is None:
        raise ValueError("the score file does not hold the head size; pass head_dim")
    group = len(masks[0]) // scores.num_key_value_heads
    kv_heads = sum(any(row[start : start + group]) for row in masks for start in range(0, len(row), group))
    full = [score for row, mask in zip(scores.scores, masks) for score, kept in zip(row, mask) if kept]
    linear = [score for row, mask in zip(scores.scores, masks) for score, kept in zip(row, mask) if not kept]
    all_kv = len(masks) * scores.num_key_value_heads
    bytes_per_kv_head = 2 * dim * 2
    return SelectionCost(
        full_attention_heads=len(full),
        heads=len(full) + len(linear),
        kv_heads=kv_heads,
        all_kv_heads=all_kv,
        kv_bytes_per_token=kv_heads * bytes_per_kv_head,
        teacher_kv_bytes_per_token=all_kv * bytes_per_kv_head,
        state_bytes=len(linear) * dim * (4 * dim + 3 * CONVOLUTION * 2),
        decided_by_tie_break=sum(score in set(linear) for score in full),
        without_evidence=sum(not score > 0 for score in full),
    )


def same_cache_in_other_unit(scores: HeadScores, masks: Masks, strategy: str, budget_unit: str) -> tuple[str, Masks]:
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
    best = masks
    for budget in range(cost.full_attention_heads, 0, -1):
        try:
            trial = select_heads(scores, budget / cost.heads, strategy, "heads")
        except ValueError:
            break
        if selection_cost(scores, trial, head_dim=1).kv_heads <= cost.kv_heads:
            best = trial
            break
    return "heads", best
