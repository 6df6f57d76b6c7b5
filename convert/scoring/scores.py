"""Head scores: how much each query head of a teacher matters, by several methods, with what they were measured on.

Plain data, read and fused without PyTorch: what selection and pictures need.
"""

import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import NamedTuple

import numpy as np

from ...files import atomic_file, read_json
from .methods import METHODS, check_methods

BUILT_IN = ("retrieval", "copying", "language", "code")  # capabilities of the probes that need no file
TEXT = "plain-text"  # the probe of the capability `language` that the KL on text stands for
THRESHOLD = 0.01  # effect above which a head counts as active

Effects = list[list[list[float]]]
"""`[pairs used][L][H]`."""


@dataclass
class ProbeResult:
    """
    What one probe gave.

    Attributes:
        name, capability, counterfactual, resampled: as in `Probe`.
        pairs, used: pairs of the probe, and those that counted; 0 for a probe that is left out.
        dropped: pairs that the teacher does not tell apart: the corruption moves the readout by less than 1 logit, or
            the wrong answer is preferred in the clean text already.
        answered: of all pairs, those that the teacher answers by greedy generation.
        readouts: clean and corrupt readout of each pair used, in logits.
        effects: by quantity, raw effects of each pair used. Shares of the difference between the two readouts, but
            attention is a share of attention, logit contribution is in logits and the KL on text in nats per token.
    """

    name: str
    capability: str
    counterfactual: str = "value"
    resampled: int = 0
    pairs: int = 0
    used: int = 0
    dropped: int = 0
    answered: int = 0
    readouts: list[list[float]] = field(default_factory=list)
    effects: dict[str, Effects] = field(default_factory=dict)

    def measured(self, method: str) -> bool:
        """Whether the probe holds what a method needs; of a mean of methods, what one of them needs."""
        row = METHODS[method]
        if row.mean_of:
            return any(map(self.measured, row.mean_of))
        return all(quantity in self.effects for quantity in row.quantities)

    def as_arrays(self) -> "ProbeResult":
        """The same with arrays for effects, which are read again and again where pairs are drawn."""
        effects = {quantity: np.array(values, dtype=float) for quantity, values in self.effects.items()}
        return replace(self, effects=effects)

    def effect(self, method: str, pairs: Sequence[int] | None = None) -> np.ndarray | None:
        """
        Mean effect `[L, H]` under a method, over all pairs or those of the given indices; `None` if not measured. A
        mean of methods has none: it is of scores.

        Each pair's effect is clamped to the method's bounds first. Where one is not finite the mean is NaN.
        """
        row, means = METHODS[method], []
        if row.mean_of or not self.measured(method):
            return None
        for quantity in row.quantities:
            values = np.array(self.effects[quantity], dtype=float)  # [pairs, L, H]; a file's null is NaN
            values = np.where(np.isfinite(values), values, np.nan).clip(*row.bounds)
            means.append((values if pairs is None else values[list(pairs)]).mean(0))
        return means[0] - means[1] if row.is_difference else np.max(means, axis=0)


class Fused(NamedTuple):
    """
    What `fuse` gives, `[L, H]` each.

    Attributes:
        scores: over all capabilities.
        capabilities, kappas: by capability, the score and the share of its variants in which a head is active.
        largest: effect in any variant, which the threshold applies to.
    """

    scores: np.ndarray
    capabilities: dict[str, np.ndarray]
    kappas: dict[str, np.ndarray]
    largest: np.ndarray


def fuse(
    probes: Sequence[ProbeResult],
    method: str,
    weights: Mapping[str, float] | None = None,
    pairs: Callable[[ProbeResult], Sequence[int] | None] = lambda probe: None,
) -> Fused:
    """
    From effects to one score (docs/method.md §2).

    A variant's effect is the larger of its two counterfactuals'; a capability's is the mean over its variants times κ,
    the share of variants in which a head passes 0.01; it is scaled to a maximum of 1 and, unless it has negative
    values, a minimum of 0; the score is the weighted mean over capabilities, equal weights by default. A head without
    a finite effect in some variant has the score NaN, and leaves the others theirs.

    Of a mean of methods, a capability's score is the mean over those that measured it.

    Raises:
        ValueError: no such method, or it was measured on none of the probes that count.
    """
    check_methods([method])
    parts, measured = METHODS[method].mean_of or (method,), measured_methods(probes)
    if missing := [part for part in parts if part not in measured]:
        raise ValueError(f"{missing[0]} was not measured on these probes; measured: {', '.join(measured)}")
    found: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for part in parts:
        for name, variants in _variants(probes, part, weights or {}, pairs).items():
            found.setdefault(name, []).append(_capability(variants))
    if not found:
        raise ValueError(f"{method}: measured only on capabilities whose weight is 0; give one of them another")
    columns = {name: [np.stack(each) for each in zip(*of_parts)] for name, of_parts in found.items()}
    capabilities, kappas = ({name: each[at].mean(0) for name, each in columns.items()} for at in (0, 1))
    weight = {name: (weights or {}).get(name, 1.0) for name in capabilities}
    scores = sum(capabilities[name] * weight[name] for name in capabilities) / sum(weight.values())
    return Fused(scores, capabilities, kappas, np.max([each[2].max(0) for each in columns.values()], axis=0))


def _variants(
    probes: Sequence[ProbeResult], method: str, weights: Mapping[str, float], pairs: Callable
) -> dict[str, dict[str, list[np.ndarray]]]:
    """By capability whose weight is not 0, and variant: effects `[L, H]` by each counterfactual."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for probe in probes:
        counts = probe.used and weights.get(probe.capability, 1.0) > 0
        effect = probe.effect(method, pairs(probe)) if counts else None
        if effect is not None:
            found.setdefault(probe.capability, {}).setdefault(probe.name, []).append(effect)
    return found


def _capability(variants: Mapping[str, Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one capability by one method: score, κ, and the largest effect in any variant."""
    means = np.stack([np.max(effects, axis=0) for effects in variants.values()])  # [variants, L, H]
    kappa = (means > THRESHOLD).mean(0)
    score = np.where(means.mean(0) > 0, means.mean(0) * kappa, means.mean(0))
    low = max(np.fmin.reduce(score, axis=None), 0.0)  # fmin and fmax pass over NaN
    spread = np.fmax.reduce(score, axis=None) - low
    return (score - low) / spread if spread > 0 else score * 0, kappa, means.max(0)


def measured_methods(probes: Sequence[ProbeResult]) -> list[str]:
    """The methods whose effects some probe with usable pairs holds."""

    def is_measured(name: str) -> bool:
        return any(probe.used and probe.measured(name) for probe in probes)

    return [name for name, row in METHODS.items() if all(map(is_measured, row.mean_of or (name,)))]


@dataclass
class HeadScores:
    """
    A ranking of all query heads of a teacher, `[L][H]`, and how it came about.

    Attributes:
        scores: the fused score of `method`, 1 at most.
        tie_break: orders heads of equal score, larger first; the mean distance that a head attends over, in tokens.
        num_key_value_heads: KV heads per layer, for budgets in KV groups.
        probes: what every probe gave, for every method that was measured.
        capabilities: score of each capability before fusion, of `method`.
        method: whose ranking this is; see `using`.
        teacher, revision, versions, seed: provenance.
        seconds: cost of each method.
        kappa: by capability, the share of its variants in which a head is active.
        weights: of the capabilities.
        head_dim: for what a choice costs in cache.
        made_from: what else decided it: text, length, options, digest of the forms.
        evidence: see `scoring.evidence`.
        warnings: what to know before trusting the ranking, in words.
    """

    scores: list[list[float]]
    tie_break: list[list[float]]
    num_key_value_heads: int
    probes: list[ProbeResult]
    capabilities: dict[str, list[list[float]]]
    method: str
    teacher: str
    revision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    kappa: dict[str, list[list[float]]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    head_dim: int | None = None
    made_from: dict = field(default_factory=dict)
    evidence: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def drawn(cls, layers: int, heads: int, num_key_value_heads: int, seed: int = 0) -> "HeadScores":
        """A ranking at random, for masks before anything is measured: they spread over layers and KV groups."""
        scores = np.random.default_rng(seed).random((layers, heads)).tolist()
        return cls(scores, [[0.0] * heads] * layers, num_key_value_heads, [], {}, "drawn at random", "", seed=seed)

    def using(self, method: str) -> "HeadScores":
        """
        The ranking of another method that was measured too.

        Raises:
            ValueError: it was not.
        """
        fused = fuse(self.probes, method, self.weights)
        return replace(
            self,
            method=method,
            scores=fused.scores.tolist(),
            capabilities={name: score.tolist() for name, score in fused.capabilities.items()},
            kappa={name: share.tolist() for name, share in fused.kappas.items()},
        )

    def methods(self) -> list[str]:
        """The methods that were measured, best first as `METHODS` lists them."""
        return measured_methods(self.probes)

    def active(self) -> np.ndarray:
        """Bool `[L, H]`: heads whose effect passes 0.01 in some variant."""
        return fuse(self.probes, self.method, self.weights).largest > THRESHOLD

    def brief(self) -> dict:
        """
        What a choice of heads takes with it: the ranking and its evidence, without the effects of every pair.

        Returns:
            `method`, `scores`, `capabilities`, `weights` and `warnings`; `measured_on`, what of `made_from` a reader
            asks for; `probes`, each with what was asked and what counted; `not_probed`, the capabilities of built-in
            probes that were left out; `stability` and `knockout`, as `scoring.evidence` has them. NaN is `None`.
        """
        evidence = dict(self.evidence)
        names = ("method", "scores", "capabilities", "weights", "warnings")
        counts = ("name", "capability", "counterfactual", "pairs", "used", "dropped", "answered")
        probed = {probe.capability for probe in self.probes}
        return _rounded(
            {name: getattr(self, name) for name in names}
            | {
                "measured_on": {name: self.made_from.get(name) for name in ("text", "length", "pairs", "shortlist")},
                "probes": [{name: getattr(probe, name) for name in counts} for probe in self.probes],
                "not_probed": [name for name in BUILT_IN if name not in probed],
                "stability": evidence.pop("stability", {}),
                "knockout": evidence,
            }
        )

    def merge(self, other: "HeadScores") -> "HeadScores":
        """
        One file of two: pairs of further probes, or further methods on the same probes. Evidence has to be made anew.

        Raises:
            ValueError: they are of different teachers, or measured the same thing twice.
        """
        if (self.teacher, self.revision) != (other.teacher, other.revision):
            raise ValueError(f"scores of {self.teacher} and {other.teacher} cannot be merged: different teachers")
        probes = [replace(probe, effects=dict(probe.effects)) for probe in self.probes]
        for probe in other.probes:
            key = (probe.name, probe.counterfactual)
            same = next((mine for mine in probes if (mine.name, mine.counterfactual) == key), None)
            if same is None:
                probes.append(probe)
                continue
            twice = sorted(set(same.effects) & set(probe.effects))
            if same.readouts != probe.readouts or twice:
                what = f"{', '.join(twice)} twice" if twice else "different pairs"
                raise ValueError(f"{probe.name} ({probe.counterfactual}): the files hold {what}; merge other probes")
            same.effects.update(probe.effects)
        merged = replace(
            self,
            probes=probes,
            seconds=self.seconds | {k: v + self.seconds.get(k, 0) for k, v in other.seconds.items()},
            weights=self.weights | other.weights,
            warnings=list(dict.fromkeys(self.warnings + other.warnings)),
            evidence={},
        )
        return merged.using(self.method)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all. Numbers are rounded to six digits; `load` reads null as NaN again."""
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(_rounded(asdict(self)), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """
        Read what `save` wrote.

        Raises:
            ValueError: the file is missing, or is not a score file.
        """
        data = read_json(Path(path))
        try:
            data["probes"] = [ProbeResult(**probe) for probe in data["probes"]]
            measured = {"scores", "tie_break", "capabilities", "kappa"} & data.keys()
            scores = cls(**data | {name: _numbers(data[name]) for name in measured})
            scores._check()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not a head score file ({error})") from None
        return scores

    def _check(self) -> None:
        """Raise a `ValueError` that names the field at fault: a file may hold anything."""
        check_types(self)
        check_methods([self.method])
        shape = (len(self.scores), len(self.scores[0]) if self.scores and isinstance(self.scores[0], list) else 0)
        if 0 in shape:
            raise ValueError("scores: expected numbers [layers, heads], got none")
        arrays = {"scores": self.scores, "tie_break": self.tie_break, **self.capabilities, **self.kappa}
        for name, array in arrays.items():
            _check_array(name, array, shape)
        groups = self.num_key_value_heads
        if groups < 1 or shape[1] % groups:
            raise ValueError(f"num_key_value_heads: {groups}, expected a divisor of the {shape[1]} heads of a layer")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim: {self.head_dim}, expected a positive number")
        for name in ("weights", "seconds"):
            _check_array(name, list(getattr(self, name).values()), (len(getattr(self, name)),))
        for probe in self.probes:
            check_types(probe)
            for name, effects in probe.effects.items() if probe.used else ():
                _check_array(f"{probe.name}: {name}", _numbers(effects), (probe.used, *shape))


def check_types(record) -> None:
    """Raise a `ValueError` that names the first field of a dataclass whose value is not of its annotated type."""
    for name, hint in typing.get_type_hints(type(record)).items():
        hints = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = tuple(typing.get_origin(each) or each for each in hints)
        value = getattr(record, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: expected {wanted}, got {type(value).__name__}")


def _check_array(name: str, value, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless nested lists are numbers of a shape."""
    try:
        array = np.array(value)
    except ValueError:  # rows of unequal length
        array = np.array("")
    if array.shape != shape or array.dtype.kind not in "if":
        raise ValueError(f"{name}: expected numbers {list(shape)}")


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def _numbers(value):
    """What `_rounded` wrote, with NaN where a number was not finite."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return math.nan if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
