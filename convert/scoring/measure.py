"""Measuring head scores: every method over every probe (the scores themselves are in `scores`)."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ...provenance import environment
from ..forms import FormOutputs
from ..hooks import Head, each_head_replaced, home
from ..migration import measure_heads
from ..teachers import adapter_for, public_name, read_model
from .ablation import mean_heads
from .attribution import attention_mass, attribution_effects, logit_contribution, query_key_effects
from .probes import Pair, Probe
from .readout import answer_measure
from .receivers import receiver_effects
from .recompute import HeadReader
from .replacement import answer_effects, answer_estimates, shortlisted, text_effects, text_estimates
from .scores import CLEAN_ONLY, METHODS, NEEDS_FORMS, TEXT, THRESHOLD, Effects, HeadScores, ProbeResult
from .senders import sender_effects

MIN_READOUT_CHANGE = 1.0  # logits: effects are shares of the change, and a share of nearly nothing is noise
TIE_BREAK_TOKENS = 512


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
        sender_shortlist: see `senders.sender_effects`.
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
        versions=environment()["versions"],
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
