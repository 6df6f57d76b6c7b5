"""From head scores to head masks, under a budget of heads or of KV cache."""

import random

from .scoring import HeadScores

STRATEGIES = ("global", "global-constrained", "layer", "fixed", "layer-random", "global-random", "layerwise")
BUDGET_UNITS = ("heads", "kv_groups")


def select_heads(
    scores: HeadScores,
    ratio: float,
    strategy: str = "global-constrained",
    budget_unit: str = "heads",
    seed: int = 0,
) -> list[list[int]]:
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

    Returns:
        masks `[L][H]`, 1 for full attention.

    Raises:
        ValueError: an unknown strategy or unit, or a ratio that leaves no head or cannot give each layer one.
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
    needs_all_layers = strategy not in ("global", "global-random", "layerwise")
    if budget < 1 or (needs_all_layers and budget < layers):
        least = layers if needs_all_layers else 1
        raise ValueError(
            f"ratio {ratio} keeps {budget} of {len(places)} {budget_unit}, {strategy} needs at least {least}"
        )

    def rank(candidates):
        return sorted(candidates, key=lambda place: units[place[0]][place[1]], reverse=True)

    rng = random.Random(seed)
    share = [budget // layers + (layer < budget % layers) for layer in range(layers)]
    if strategy == "global":
        chosen = rank(places)[:budget]
    elif strategy == "global-constrained":
        best = [rank((layer, unit) for unit in range(per_layer))[0] for layer in range(layers)]
        others = [place for place in rank(places) if place not in best]
        chosen = best + others[: budget - layers]
    elif strategy == "layer":
        ranked = [rank((layer, unit) for unit in range(per_layer)) for layer in range(layers)]
        chosen = [place for row, count in zip(ranked, share) for place in row[:count]]
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

    kept = set(chosen)
    return [[int((layer, head // size) in kept) for head in range(per_layer * size)] for layer in range(layers)]
