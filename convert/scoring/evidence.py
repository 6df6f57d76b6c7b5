"""Is a ranking true? Split-half stability, and what happens when its heads are knocked out (docs/method.md §2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from ..forms import HeadForms, linear_heads
from ..hooks import Visit, visited_heads
from ..selection import Head, Masks
from .ablation import MEAN_TEXTS, constant_heads, mean_heads
from .methods import METHODS
from .probes import Pair
from .readout import answers_found
from .scores import TEXT, HeadScores, ProbeResult, fuse

SPLITS = 100
STABILITY_PAIRS = (4, 8, 12, 16)
RANDOM_ORDERS = 5
TOP_SHARE = 1 / 8  # of all heads: what "top" means where the choice's budget is not known
Order = list[Head]


def ranking(scores: Sequence[Sequence[float]], tie_break: Sequence[Sequence[float]]) -> Order:
    """Heads (layer, head) from the best to the worst; one without a score comes last."""
    places = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]

    def rank(place: tuple[int, int]) -> tuple[float, float]:
        score = scores[place[0]][place[1]]
        return (-math.inf if math.isnan(score) else score), tie_break[place[0]][place[1]]

    return sorted(places, key=rank, reverse=True)


def random_orders(scores: Sequence[Sequence[float]], count: int) -> list[Order]:
    """`count` random orders of all heads, the same in every call."""
    places = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    generator = torch.Generator().manual_seed(0)
    return [[places[i] for i in torch.randperm(len(places), generator=generator).tolist()] for _ in range(count)]


def as_masks(heads: Order, layers: int, width: int) -> Masks:
    """`[L][H]`, 1 for the heads given."""
    chosen = set(heads)
    return [[int((layer, head) in chosen) for head in range(width)] for layer in range(layers)]


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks of a vector; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2.0)[inverse]


def spearman(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Rank correlation of two vectors; `None` where fewer than three values or no variation leave it undefined."""
    if len(one) < 3 or (one == one[0]).all() or (other == other[0]).all():
        return None
    return float(torch.corrcoef(torch.stack([average_ranks(one), average_ranks(other)]).double())[0, 1])


def stability(scores: HeadScores, method: str) -> dict[str, dict]:
    """
    Split-half stability of a method's fused ranking, at 4, 8, 12 and 16 pairs as far as there are so many.

    That many pairs of every probe (or all of fewer) are drawn at random and split in halves, 100 times; each half is
    scored on its own.

    Returns:
        by number of pairs: `rho` (Spearman over active heads, mean over the splits) with the 95% interval of
        the splits `rho_low`, `rho_high`, or `None` with fewer than three such heads; `overlap` of the halves' best
        eighth of all heads, with `overlap_low`, `overlap_high`; `heads`, how many are active.
    """
    scores = scores.using(method)
    active = torch.from_numpy(scores.active())
    probes = [probe.as_arrays() for probe in scores.probes if probe.used and probe.measured(method)]
    available = max((probe.used for probe in probes if probe.name != TEXT), default=0)
    generator = torch.Generator().manual_seed(0)
    top = max(1, round(TOP_SHARE * active.numel()))
    found = {}
    for count in STABILITY_PAIRS:
        if count > available:
            continue
        rhos, overlaps = [], []
        for _ in range(SPLITS):
            drawn = {id(p): torch.randperm(p.used, generator=generator).tolist()[:count] for p in probes}
            halves = [_half(probes, method, scores.weights, drawn, start) for start in (0, 1)]
            rho = spearman(*(half[active] for half in halves))
            rhos += [rho] if rho is not None else []
            best = [set(half.flatten().argsort(descending=True)[:top].tolist()) for half in halves]
            overlaps.append(len(best[0] & best[1]) / top)
        found[str(count)] = {"heads": int(active.sum()), "splits": SPLITS, "top": top}
        for name, values in (("rho", rhos), ("overlap", overlaps)):
            found[str(count)] |= _interval(name, values)
    return found


def _half(
    probes: Sequence[ProbeResult], method: str, weights, drawn: dict[int, list[int]], start: int
) -> torch.Tensor:
    """Scores `[L, H]` from every other one of the pairs drawn of each probe; a single pair is in both halves."""

    def pairs(probe: ProbeResult) -> list[int]:
        return drawn[id(probe)][start::2] or drawn[id(probe)]

    return torch.from_numpy(fuse(probes, method, weights, pairs).scores)


def _interval(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 2.5% and 97.5% quantiles."""
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    tensor = torch.tensor(values)
    low, high = tensor.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {name: float(tensor.mean()), f"{name}_low": low, f"{name}_high": high}


def knockout_sizes(heads: int) -> list[int]:
    """How many heads a knock-out curve takes away: 1, 2, 4, … and half of all."""
    sizes = [1]
    while sizes[-1] * 2 < heads // 2:
        sizes.append(sizes[-1] * 2)
    return sorted({*sizes, max(1, heads // 2)})


def knockout(
    teacher: PreTrainedModel,
    scores: HeadScores,
    methods: Sequence[str],
    pairs: Sequence[Pair],
    replace_heads: Callable[[Masks], Visit] | None = None,
    sizes: Sequence[int] | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> dict:
    """
    Accuracy by greedy generation when the best k heads of each method are replaced, its worst k, and random k.

    Args:
        pairs: prompts with their answers; only clean texts are used.
        replace_heads: from `[L][H]` masks of the heads to replace to how; mean ablation by default, with means over
            the first clean prompts.
        sizes: numbers k of heads.
        on_point: called after each accuracy.

    Returns:
        `pairs`, `intact` accuracy, `sizes`, `random` (one curve for each of 5 orders), and `methods`: `top` and
        `bottom` curve of each.
    """
    layers, width = len(scores.scores), len(scores.scores[0])
    if replace_heads is None:
        replace_heads = partial(constant_heads, mean_heads(teacher, [pair.clean for pair in pairs[:MEAN_TEXTS]]))
    sizes = list(sizes or knockout_sizes(layers * width))

    known: dict[frozenset, float] = {}  # methods share their best heads, and all heads are all in any order

    def accuracy(heads: Order) -> float:
        chosen = frozenset(heads)
        if chosen not in known:
            with visited_heads(teacher, replace_heads(as_masks(heads, layers, width))):
                found = answers_found(teacher, pairs)
            known[chosen] = sum(found) / len(found)
        on_point()
        return known[chosen]

    curves = {}
    for method in methods:
        ranked = scores.using(method)
        order = ranking(ranked.scores, ranked.tie_break)
        curves[method] = {
            "top": [accuracy(order[:size]) for size in sizes],
            "bottom": [accuracy(order[-size:]) for size in sizes],
        }
    orders = random_orders(scores.scores, RANDOM_ORDERS)
    intact = answers_found(teacher, pairs)
    return {
        "pairs": len(pairs),
        "intact": sum(intact) / len(intact),
        "sizes": sizes,
        "random": [[accuracy(order[:size]) for size in sizes] for order in orders],
        "methods": curves,
    }


def knockout_points(methods: int, heads: int) -> int:
    """How many accuracies `knockout` measures."""
    return (2 * methods + RANDOM_ORDERS) * len(knockout_sizes(heads))


def knockout_warnings(curves: dict, name: str, done: str, judged: Sequence[str]) -> list[str]:
    """
    What a knock-out says against a ranking, or against its probe, in words.

    Args:
        done: what was done to heads, such as `ablated`.
        judged: methods whose question this answers.
    """
    intact = curves["intact"]
    if intact == 0:
        return [f"{name}: the intact teacher answers none of the prompts; replacing heads shows nothing"]
    lowest = min([*(min(curve) for curve in curves["random"]), *(min(c["top"]) for c in curves["methods"].values())])
    if lowest > intact / 2:
        return [
            f"{name}: with heads {done} it cannot be made to fail (accuracy {intact:.2f}, at worst {lowest:.2f}); it "
            "proves nothing about any ranking"
        ]
    warnings = []
    for method in judged:
        curve = curves["methods"][method]
        for index, size in enumerate(curves["sizes"]):
            expected = sum(order[index] for order in curves["random"]) / len(curves["random"])
            if curve["bottom"][index] < intact - 0.1 and curve["bottom"][index] < expected:
                warnings.append(
                    f"{name}: the bottom {size} heads of {method} are load-bearing: with them {done} accuracy is "
                    f"{curve['bottom'][index]:.2f}, with {size} random ones {expected:.2f}; keep some of them, or use "
                    "another method"
                )
                break
    return warnings


def with_evidence(
    teacher: PreTrainedModel,
    scores: HeadScores,
    methods: Sequence[str],
    pairs_by_variant: dict[str, Sequence[Pair]],
    forms: HeadForms | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> HeadScores:
    """
    A score file with its own evidence, and the warnings that follow from it.

    Whether a capability needs a head is shown by mean ablation, whether a linear head can do its work by conversion:
    the second is asked where there are aligned forms, and it is what the replacement effect is judged by. Stability is
    that of every method measured.

    Args:
        methods: to compare, all of them measured.
        pairs_by_variant: by name of the probe, the prompts to replace heads on.
    """
    evidence: dict[str, dict] = {"stability": {method: stability(scores, method) for method in scores.methods()}}
    warnings = list(scores.warnings)
    for method in methods:
        found = evidence["stability"][method]
        most = found[max(found, key=int)] if found else {}
        if most.get("rho") is not None and most["rho"] < 0.7:
            warnings.append(
                f"{method}: halves of the pairs rank heads differently (Spearman {most['rho']:.2f}); use more pairs"
            )
    kinds = {"ablated": ("ablation", None, [method for method in methods if not METHODS[method].needs_forms])}
    if forms is not None:
        kinds["converted"] = ("conversion", partial(linear_heads, forms), list(methods))
    for done, (kind, replace_heads, judged) in kinds.items():
        evidence[kind] = {}
        for name, pairs in pairs_by_variant.items():
            curves = knockout(teacher, scores, methods, pairs, replace_heads, on_point=on_point)
            evidence[kind][name] = curves
            warnings += knockout_warnings(curves, name, done, judged)
    return replace(scores, evidence=evidence, warnings=list(dict.fromkeys(warnings)))
