"""Head scores: how much each query head of a teacher matters, by several methods, with what they were measured on."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from ..hub.checkpoint import whole_file
from .ablation import answer_measure, each_head_replaced, mean_heads
from .attribution import attention_mass, attribution_effects, logit_contribution, query_key_effects
from .forms import FormOutputs
from .migration import measure_heads
from .patching import Head, HeadReader, home, receiver_effects, sender_effects
from .probes import Pair, Probe
from .replacement import answer_effects, answer_estimates, shortlisted, text_effects, text_estimates
from .teachers import adapter_for, public_name, read_model

METHODS = {
    "replacement": "readout and text lost to the linear form, less what the full form loses: what a slot is worth",
    "receiver+sender": "the paper's: direct effect on the answer, or effect through the heads that have one",
    "receiver": "direct effect on the answer",
    "sender": "effect through the receivers, by path patching",
    "attribution": "first-order estimate of the effect of a head's corrupted output (AtP)",
    "attribution-qk": "the same for queries, keys and values, attention computed exactly (AtP*)",
    "attention": "share of attention on what the pair changes",
    "logit-contribution": "what is written from the needle towards the answer's unembedding (LOCOS)",
    "mean-ablation": "readout lost when a head writes its mean",
}
NEEDS_FORMS = ("replacement",)
CLEAN_ONLY = ("replacement", "mean-ablation")  # never look at the corrupt text: one counterfactual is enough
TEXT = "plain-text"  # the probe of the capability `language` that the KL on text stands for
MIN_READOUT_CHANGE = 1.0  # logits: effects are shares of the change, and a share of nearly nothing is noise
THRESHOLD = 0.01  # effect above which a head counts as taking part
TIE_BREAK_TOKENS = 512

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

    def effect(self, method: str, pairs: Sequence[int] | None = None) -> torch.Tensor | None:
        """
        Mean effect `[L, H]` under a method, over all pairs or those of the given indices; `None` if not measured.

        Receivers and senders are clamped to [0, 1] pair by pair, others to ≥ 0; the replacement effect keeps its sign,
        because a full form may be worse than a linear one.
        """
        parts = {"receiver+sender": ("receiver", "sender"), "replacement": ("linear", "full")}.get(method, (method,))
        if any(part not in self.effects for part in parts):
            return None
        means = []
        for part in parts:
            values = torch.tensor(self.effects[part])
            values = values if pairs is None else values[list(pairs)]
            if part in ("receiver", "sender"):
                values = values.clamp(0, 1)
            elif method != "replacement":
                values = values.clamp_min(0)
            means.append(values.mean(0))
        if method == "replacement":
            return means[0] - means[1]
        return torch.stack(means).amax(0)


class Fused(NamedTuple):
    """
    What `fuse` gives, `[L, H]` each.

    Attributes:
        scores: over all capabilities.
        capabilities, kappas: by capability, the score and the share of its forms in which a head takes part.
        largest: effect in any form, which the threshold applies to.
    """

    scores: torch.Tensor
    capabilities: dict[str, torch.Tensor]
    kappas: dict[str, torch.Tensor]
    largest: torch.Tensor


def fuse(
    probes: Sequence[ProbeResult],
    method: str,
    weights: Mapping[str, float] | None = None,
    pairs: Callable[[ProbeResult], Sequence[int] | None] = lambda probe: None,
) -> Fused:
    """
    From effects to one score (METHOD §2).

    A form's effect is the larger of its two counterfactuals'; a capability's is the mean over its forms times κ, the
    share of forms in which a head passes 0.01; it is scaled to a maximum of 1 and, unless it has negative values, a
    minimum of 0; the score is the weighted mean over capabilities, equal weights by default.

    Raises:
        ValueError: the method was measured on none of the probes.
    """
    forms: dict[str, dict[str, list[torch.Tensor]]] = {}
    for probe in probes:
        counts = probe.used and (weights or {}).get(probe.capability, 1.0) > 0
        effect = probe.effect(method, pairs(probe)) if counts else None
        if effect is not None:
            forms.setdefault(probe.capability, {}).setdefault(probe.name, []).append(effect)
    if not forms:
        raise ValueError(f"{method} was not measured on these probes; measured: {', '.join(measured_methods(probes))}")
    capabilities, kappas, largest = {}, {}, []
    for capability, by_name in forms.items():
        means = torch.stack([torch.stack(effects).amax(0) for effects in by_name.values()])  # [forms, L, H]
        largest.append(means.amax(0))
        kappas[capability] = (means > THRESHOLD).float().mean(0)
        score = torch.where(means.mean(0) > 0, means.mean(0) * kappas[capability], means.mean(0))
        low = score.min().clamp_min(0)
        spread = score.max() - low
        capabilities[capability] = (score - low) / spread if spread > 0 else torch.zeros_like(score)
    weight = {name: (weights or {}).get(name, 1.0) for name in capabilities}
    total = sum(weight.values())
    scores = sum(capabilities[name] * weight[name] for name in capabilities) / total
    return Fused(scores, capabilities, kappas, torch.stack(largest).amax(0))


def measured_methods(probes: Sequence[ProbeResult]) -> list[str]:
    """The methods whose effects some probe with usable pairs holds."""
    return [name for name in METHODS if any(probe.used and probe.effect(name) is not None for probe in probes)]


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
        kappa: by capability, the share of its forms in which a head takes part.
        weights: of the capabilities.
        head_dim: for what a choice costs in cache.
        evidence: see `convert.evidence`.
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
    evidence: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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

    def taking_part(self) -> torch.Tensor:
        """Bool `[L, H]`: heads whose effect passes 0.01 in some form."""
        return fuse(self.probes, self.method, self.weights).largest > THRESHOLD

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
        """Write as JSON, whole or not at all. Effects are rounded to six digits."""
        with whole_file(path) as partial:
            partial.write_text(json.dumps(_rounded(asdict(self))) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """
        Read what `save` wrote.

        Raises:
            ValueError: the file is missing, or is not a score file.
        """
        try:
            data = json.loads(Path(path).read_text())
            data["probes"] = [ProbeResult(**probe) for probe in data["probes"]]
            return cls(**data)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a head score file ({error})") from None


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def score_heads(
    teacher: PreTrainedModel,
    tokenizer,
    probes: Sequence[Probe],
    on_pair: Callable[[], None] | None = None,
    *,
    methods: Sequence[str] | None = None,
    head_forms: FormOutputs | None = None,
    text_rows: Sequence[Sequence[int]] = (),
    shortlist: int | None = None,
    sender_shortlist: int = 32,
    weights: Mapping[str, float] | None = None,
    revision: str | None = None,
    seed: int = 0,
    done: Sequence[ProbeResult] = (),
    on_probe: Callable[[Sequence[ProbeResult]], None] = lambda results: None,
) -> HeadScores:
    """
    Score every query head of a teacher by one or several methods (METHOD §2).

    Args:
        teacher: a model of a supported family, in eval mode, where it should run; off-loaded by accelerate or not.
        tokenizer: the teacher's; only its name is used, probes hold token ids.
        probes: what to measure on.
        on_pair: called after each pair and method.
        methods: names in `METHODS`; the first is whose ranking the result shows. By default the replacement effect
            where `head_forms` are given, else the paper's receivers and senders.
        head_forms: aligned forms of all heads; needed for the replacement effect.
        text_rows: token ids of plain texts, on which the replacement effect measures the KL too.
        shortlist: measure the replacement effect of that many heads only, chosen by gradient; the others have their
            first- (readout) and second-order (KL) estimates. All heads by default.
        sender_shortlist: see `patching.sender_effects`.
        weights: of capabilities in the fused score, 1 for those not named, 0 leaves one out.
        revision, seed: recorded.
        done: what an earlier call with the same arguments has measured, which is not measured again.
        on_probe: told all that has been measured so far, after each probe.

    Raises:
        ValueError: no probes, an unknown method, an unsupported teacher, or no pair that the teacher tells apart.
    """
    if not probes:
        raise ValueError("no probes to score heads on")
    methods = list(methods or ("replacement" if head_forms is not None else "receiver+sender",))
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method in NEEDS_FORMS and head_forms is None:
            raise ValueError(f"{method} needs aligned forms of the heads: align first, or choose another method")
    adapter = adapter_for(teacher.config)
    measuring = _Measuring(teacher, head_forms, shortlist, sender_shortlist, on_pair or (lambda: None))
    finished = {(result.name, result.counterfactual): result for result in done}
    results: list[ProbeResult] = []
    for probe in probes:
        if (probe.name, probe.counterfactual) in finished:
            results.append(finished[probe.name, probe.counterfactual])
            continue
        seen = any(result.name == probe.name and result.used for result in results)
        skipped = set(CLEAN_ONLY) if seen else set()
        if len(text_rows) and probe.capability == "language":
            skipped.add("replacement")  # the KL on text says it better
        results.append(measuring.probe(probe, [method for method in methods if method not in skipped]))
        on_probe(results)
    if not any(result.used for result in results):
        raise ValueError(_nothing_usable(probes))
    if "replacement" in methods and len(text_rows):
        results.append(measuring.text(text_rows))

    started = time.perf_counter()
    # Most heads score 0. Those that look far are the harder ones to replace by a state that forgets.
    row = min(TIE_BREAK_TOKENS, *(len(pair.clean) for pair in probes[0].pairs[:2]))
    text = torch.tensor([pair.clean[:row] for pair in probes[0].pairs[:2]])
    tie_break = measure_heads(adapter, read_model(teacher), text, home(teacher)).distance.tolist()
    measuring.spend("tie-break", started)
    scores = HeadScores(
        scores=[],
        tie_break=tie_break,
        num_key_value_heads=adapter.num_kv_heads,
        probes=results,
        capabilities={},
        method=methods[0],
        teacher=public_name(teacher.config.name_or_path),
        revision=revision,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        seed=seed,
        seconds=measuring.seconds,
        weights=dict(weights or {}),
        head_dim=adapter.head_dim,
        warnings=probe_warnings(results),
    )
    return scores.using(methods[0])


def _nothing_usable(probes: Sequence[Probe]) -> str:
    names = ", ".join(dict.fromkeys(probe.name for probe in probes))
    count = sum(len(probe.pairs) for probe in probes)
    return (
        f"{names}: the teacher answers or tells apart none of the {count} pairs; it lacks this capability at this "
        "length, use a shorter or easier probe"
    )


def probe_warnings(results: Sequence[ProbeResult]) -> list[str]:
    """What is wrong with the probes, in words."""
    warnings = []
    for result in results:
        where = f"{result.name} ({result.counterfactual})"
        if not result.used:
            warnings.append(
                f"{where}: left out; of {result.pairs} pairs the teacher answers {result.answered} and tells "
                f"{result.pairs - result.dropped} apart"
            )
        elif result.used < 4 and result.name != TEXT:
            warnings.append(f"{where}: only {result.used} of {result.pairs} pairs are usable; use at least 4")
    return warnings


class _Measuring:
    """Runs the methods over probes and keeps count of their cost."""

    def __init__(self, teacher, forms: FormOutputs | None, shortlist: int | None, senders: int, on_pair):
        self.teacher, self.forms, self.shortlist, self.senders = teacher, forms, shortlist, senders
        self.on_pair, self.reader, self.seconds = on_pair, HeadReader(teacher), {}

    def spend(self, method: str, started: float) -> None:
        """Adds the time since `started` to a method's cost."""
        self.seconds[method] = self.seconds.get(method, 0.0) + time.perf_counter() - started

    def probe(self, probe: Probe, methods: Sequence[str]) -> ProbeResult:
        """
        Some methods on one probe.

        Receivers are always measured: they cost no more than finding out which pairs are usable.
        """
        result = ProbeResult(probe.name, probe.capability, probe.counterfactual, probe.resampled, len(probe.pairs))
        started, pairs, scales, receivers = time.perf_counter(), [], [], []
        for pair in probe.pairs:
            found = receiver_effects(self.teacher, pair)
            scale = found.clean - found.corrupt
            result.answered += found.answered
            if not (scale >= MIN_READOUT_CHANGE and found.clean > 0):  # also refuses a readout that is no number
                result.dropped += 1
            else:
                pairs.append(pair)
                scales.append(scale)
                receivers.append(found.drops / scale)
                result.readouts.append([found.clean, found.corrupt])
            self.on_pair()
        self.spend("receiver", started)
        able = not probe.generated or result.answered >= len(probe.pairs) / 2
        if not pairs or not able:
            result.readouts.clear()
            return result
        result.used = len(pairs)
        result.effects["receiver"] = torch.stack(receivers).tolist()
        if {"sender", "receiver+sender"} & set(methods):
            started = time.perf_counter()
            mean = torch.stack(receivers).clamp(0, 1).mean(0)
            heads = [(layer, head) for layer, head in (mean > THRESHOLD).nonzero().tolist()]
            result.effects["sender"] = sender_effects(
                self.reader, pairs, scales, heads, THRESHOLD, self.senders
            ).tolist()
            self.spend("sender", started)
        for method in methods:
            if method in ("receiver", "sender", "receiver+sender"):
                continue
            started = time.perf_counter()
            for name, effects in self._method(method, pairs, scales).items():
                result.effects[name] = effects
            self.spend(method, started)
        return result

    def _method(self, method: str, pairs: Sequence[Pair], scales: Sequence[float]) -> dict[str, Effects]:
        if method == "replacement":
            drops = [self._replacement(pair) / scale for pair, scale in zip(pairs, scales)]
            stacked = torch.stack(drops, dim=1)  # [2, pairs, L, H]
            return {"linear": stacked[0].tolist(), "full": stacked[1].tolist()}
        measure = {
            "attribution": lambda pair, scale: attribution_effects(self.teacher, pair) / scale,
            "attribution-qk": lambda pair, scale: query_key_effects(self.reader, pair) / scale,
            "attention": lambda pair, _: attention_mass(self.reader, pair),
            "logit-contribution": lambda pair, _: logit_contribution(self.reader, pair),
            "mean-ablation": self._mean_ablation(pairs),
        }[method]
        effects = []
        for pair, scale in zip(pairs, scales):
            effects.append(measure(pair, scale).tolist())
            self.on_pair()
        return {method: effects}

    def _mean_ablation(self, pairs: Sequence[Pair]):
        means: list[torch.Tensor] = []

        def measure(pair: Pair, scale: float) -> torch.Tensor:
            if not means:
                means.append(mean_heads(self.teacher, [pair.clean for pair in pairs[:4]]))

            def candidates(layer: int, _, heads: torch.Tensor) -> torch.Tensor:
                return means[0][layer].to(heads.device, heads.dtype).expand(1, *heads.shape)

            measured = each_head_replaced(self.teacher, pair.clean, candidates, answer_measure(self.teacher, pair))
            return (measured[0, ..., 0] - measured[1, ..., 0]) / scale

        return measure

    def _replacement(self, pair: Pair) -> torch.Tensor:
        """Drops `[2, L, H]`, of all heads or of the shortlist, estimates elsewhere."""
        self.on_pair()
        if self.shortlist is None:
            return answer_effects(self.teacher, self.forms, pair)[0]
        estimates = answer_estimates(self.teacher, self.forms, pair)
        exact, _ = answer_effects(self.teacher, self.forms, pair, self._wanted(estimates))
        return torch.where(exact.isnan(), estimates, exact)

    def _wanted(self, estimates: torch.Tensor) -> set[Head]:
        return shortlisted(estimates, self.shortlist)

    def text(self, rows: Sequence[Sequence[int]]) -> ProbeResult:
        """The replacement effect on plain text, as a probe of its own."""
        started, effects = time.perf_counter(), []
        for index, ids in enumerate(rows):
            if self.shortlist is None:
                effects.append(text_effects(self.teacher, self.forms, ids))
            else:
                estimates = text_estimates(self.teacher, self.forms, ids, seed=index)
                exact = text_effects(self.teacher, self.forms, ids, self._wanted(estimates))
                effects.append(torch.where(exact.isnan(), estimates, exact))
            self.on_pair()
        self.spend("replacement", started)
        stacked = torch.stack(effects, dim=1)
        return ProbeResult(
            TEXT,
            "language",
            pairs=len(rows),
            used=len(rows),
            effects={"linear": stacked[0].tolist(), "full": stacked[1].tolist()},
        )
