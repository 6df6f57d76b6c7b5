"""Measuring head scores: every method over every probe (the scores themselves are in `scores`)."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ...provenance import environment
from ..calibration import full_forms_are_teachers, measure_heads
from ..forms import HeadForms
from ..hooks import input_device
from ..teachers import TeacherAdapter, adapter_for, public_name, read_model
from .methods import DEFAULT_METHOD, METHODS, Bench, Method, UsedPairs, check_methods, measured_by
from .probes import Probe
from .receivers import receiver_effects
from .recompute import HeadReader
from .scores import TEXT, HeadScores, ProbeResult

MIN_READOUT_CHANGE = 1.0  # logits: effects are shares of the change, and a share of nearly nothing is noise
TIE_BREAK_TOKENS = 512


def score_heads(
    teacher: PreTrainedModel,
    tokenizer,
    probes: Sequence[Probe],
    on_pair: Callable[[], None] = lambda: None,
    *,
    methods: Sequence[str] | None = None,
    head_forms: HeadForms | None = None,
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
    Score every query head of a teacher by one or several methods (docs/method.md §2).

    Args:
        teacher: a model of a supported family, in eval mode, where it should run; off-loaded by accelerate or not.
        tokenizer: the teacher's; only its name is used, probes hold token ids.
        probes: what to measure on.
        on_pair: called after each pair and method.
        methods: names in `METHODS`; the first is whose ranking the result shows. By default the first of `METHODS`
            where `head_forms` are given, else the paper's receivers and senders.
        head_forms: aligned forms of all heads; needed for the replacement effect.
        text_rows: token ids of plain texts, on which the replacement effect measures the KL too.
        shortlist: measure the replacement effect of that many heads only, chosen by gradient; the others have their
            first- (readout) and second-order (KL) estimates. All heads by default.
        sender_shortlist: see `senders.sender_effects`.
        weights: of capabilities in the fused score, 1 for those not named, 0 leaves one out.
        revision, seed: recorded.
        done: of the first probes, what an earlier call with the same arguments has measured.
        on_probe: told all that has been measured so far, after each probe.

    Raises:
        ValueError: no probes, an unknown method, an unsupported teacher, or no pair that the teacher tells apart.
    """
    if not probes:
        raise ValueError("no probes to score heads on")
    methods = _chosen(methods, head_forms is not None)
    adapter, reader = adapter_for(teacher.config), HeadReader(teacher)
    same = head_forms is not None and full_forms_are_teachers(
        adapter, reader.read, head_forms.start, head_forms.config
    )
    measuring = _Measuring(Bench(teacher, reader, head_forms, shortlist, sender_shortlist, same), on_pair)
    results = measuring.all(probes, methods, text_rows, done, on_probe)
    scores = HeadScores(
        scores=[],
        tie_break=measuring.tie_break(adapter, probes[0]),
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


def _chosen(methods: Sequence[str] | None, has_forms: bool) -> list[str]:
    """The methods asked for, or the default; raises a `ValueError` where one is unknown or needs forms."""
    methods = list(methods or (DEFAULT_METHOD if has_forms else "receiver+sender",))
    check_methods(methods)
    for method in methods:
        if METHODS[method].needs_forms and not has_forms:
            raise ValueError(f"{method} needs aligned forms of the heads: align first, or choose another method")
    return methods


def _check_used(results: Sequence[ProbeResult], probes: Sequence[Probe]) -> None:
    """Raise a `ValueError` where the teacher can do nothing that it was asked."""
    if not any(result.used for result in results):
        raise ValueError(
            f"{', '.join(dict.fromkeys(probe.name for probe in probes))}: the teacher answers or tells apart none of "
            f"the {sum(len(probe.pairs) for probe in probes)} pairs; it lacks this capability at this length, use a "
            "shorter or easier probe"
        )


def methods_on(probe: Probe, names: Sequence[str], seen: bool, has_text: bool) -> list[Method]:
    """
    The methods that have something to measure on a probe.

    Args:
        seen: its other counterfactual was measured: those that never look at the corrupt text have done theirs.
        has_text: there are rows of plain text, which say more of `language` than a probe where a method reads them.
    """
    return [
        method
        for method in measured_by(names)
        if not (seen and method.clean_only)
        and not (has_text and method.measure_text and probe.capability == "language")
    ]


def score_steps(probes: Sequence[Probe], names: Sequence[str], text_rows: int) -> int:
    """At most how often `score_heads` calls back."""
    steps, seen = 0, set()
    for probe in probes:
        steps += len(probe.pairs) * (1 + len(methods_on(probe, names, probe.name in seen, text_rows > 0)))
        seen.add(probe.name)
    return steps + text_rows * sum(bool(method.measure_text) for method in measured_by(names))


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

    def __init__(self, bench: Bench, on_pair: Callable[[], None]):
        self.bench, self.on_pair, self.seconds = bench, on_pair, {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds what the block takes to the cost of `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def all(
        self,
        probes: Sequence[Probe],
        methods: Sequence[str],
        text_rows: Sequence[Sequence[int]],
        done: Sequence[ProbeResult],
        on_probe: Callable[[Sequence[ProbeResult]], None],
    ) -> list[ProbeResult]:
        """The methods on every probe that is not done, then on plain text."""
        results = list(done)
        for probe in probes[len(done) :]:
            seen = any(result.name == probe.name and result.used for result in results)
            results.append(self.probe(probe, methods_on(probe, methods, seen, len(text_rows) > 0)))
            on_probe(results)
        _check_used(results, probes)
        return results + (self.text(methods, text_rows) if len(text_rows) else [])

    def probe(self, probe: Probe, methods: Sequence[Method]) -> ProbeResult:
        """Some methods on one probe, or none of them where the teacher cannot do what it asks for."""
        result = ProbeResult(probe.name, probe.capability, probe.counterfactual, probe.resampled, len(probe.pairs))
        with self.timed("receiver"):
            used = self.usable(probe, result)
        if used is not None:
            result.used = len(used.pairs)
            result.effects["receiver"] = used.receivers.tolist()
            for method in methods:
                self.measure(method, method.measure, used, result)
        return result

    def usable(self, probe: Probe, result: ProbeResult) -> UsedPairs | None:
        """
        The pairs that the teacher tells apart, counted in `result`; `None` where too few are.

        Receivers are always measured: they cost no more than finding this out.
        """
        pairs, scales, receivers = [], [], []
        for pair in probe.pairs:
            found = receiver_effects(self.bench.teacher, pair)
            scale = found.clean - found.corrupt
            result.answered += found.answered
            if scale >= MIN_READOUT_CHANGE and found.clean > 0:  # neither holds for a readout that is no number
                pairs.append(pair)
                scales.append(scale)
                receivers.append(found.drops / scale)
                result.readouts.append([found.clean, found.corrupt])
            else:
                result.dropped += 1
            self.on_pair()
        if pairs and (not probe.generated or result.answered >= len(probe.pairs) / 2):
            return UsedPairs(pairs, scales, torch.stack(receivers))
        result.readouts.clear()
        return None

    def measure(self, method: Method, function: str, what: UsedPairs | Sequence, result: ProbeResult) -> None:
        """Put what a method measures of pairs or of texts into `result`."""
        effects = []
        with self.timed(method.name):
            for effect in method.run(function, self.bench, what):
                effects.append(effect.reshape(len(method.quantities), *effect.shape[-2:]))
                self.on_pair()
        result.effects |= zip(method.quantities, torch.stack(effects, dim=1).tolist())

    def text(self, methods: Sequence[str], rows: Sequence[Sequence[int]]) -> list[ProbeResult]:
        """What methods measure of plain text, as a probe of its own; nothing where none does."""
        result = ProbeResult(TEXT, "language", pairs=len(rows), used=len(rows))
        for method in measured_by(methods):
            if method.measure_text:
                self.measure(method, method.measure_text, rows, result)
        return [result] if result.effects else []

    def tie_break(self, adapter: TeacherAdapter, probe: Probe) -> list[list[float]]:
        """
        Mean attention distance of every head: most score 0, and those that look far are the harder ones to replace by
        a state that forgets.
        """
        with self.timed("tie-break"):
            row = min(TIE_BREAK_TOKENS, *(len(pair.clean) for pair in probe.pairs[:2]))
            text = torch.tensor([pair.clean[:row] for pair in probe.pairs[:2]])
            teacher = self.bench.teacher
            return measure_heads(adapter, read_model(teacher), text, input_device(teacher)).distance.tolist()
