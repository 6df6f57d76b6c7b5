"""Scores from a teacher's name to a folder on disk, and masks from there: `hydrahead score` and `hydrahead select`."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..demo.corpus import encode_corpus, load_corpus
from ..evaluation.report import plot_head_map, plot_head_maps, plot_knockout, plot_stability
from ..hub.checkpoint import check_free, whole_file, whole_folder
from .evidence import TOP_SHARE, as_masks, knockout_points, ranking, with_evidence
from .forms import FormOutputs, check_forms, load_forms, save_forms
from .migration import Forms, options_of, student_config
from .patching import Head, home
from .probes import NIAH_KEYS, Pair, Probe, built_in_probes, jsonl_probes, niah_probe
from .replacement import search_masks
from .scoring import CLEAN_ONLY, METHODS, NEEDS_FORMS, HeadScores, ProbeResult, score_heads
from .selection import BY_SCORE, Masks, same_cache_in_other_unit, select_heads, selection_cost
from .teachers import TeacherAdapter, adapter_for, find_checkpoint, public_name

DEFAULT_LENGTH = 4096
TEXT_ROWS, TEXT_LENGTH = 4, 512
MakeForms = Callable[[PreTrainedModel, object, np.ndarray, dict], Forms]
"""Teacher, tokenizer, text ids, student's options: aligned forms. How is not this package's business."""


@dataclass(frozen=True)
class ScoreSettings:
    """
    What to score, and on what.

    Attributes:
        teacher: Hub id or folder.
        methods: names in `METHODS`, the one to rank by first.
        length: tokens of a prompt; the teacher's native length, but 4,096 at most, by default.
        pairs: counterfactual pairs of each built-in probe.
        text: UTF-8 text to hide needles in and to measure on; the Python standard library by default.
        probe_files: JSONL files with probes of the user's own.
        built_in: use the built-in probes.
        forms: aligned forms of the heads (`head_forms.safetensors`).
        options: the student's options; where a forms file is given, none that contradicts its own.
        align_steps: of the alignment, where no forms file is given.
        shortlist: heads whose replacement effect is measured; all by default.
        evidence: measure stability and knock-out curves.
        device: `cpu`, `cuda`, …; a GPU, with off-loading as needed, where there is one, by default.
        dtype: of the teacher.
        seed, revision: as everywhere.
    """

    teacher: str
    methods: tuple[str, ...]
    length: int | None = None
    pairs: int = 8
    text: Path | None = None
    probe_files: tuple[Path, ...] = ()
    built_in: bool = True
    forms: Path | None = None
    options: dict | None = None
    align_steps: int = 100
    shortlist: int | None = None
    evidence: bool = True
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0
    revision: str | None = None


def check_settings(settings: ScoreSettings) -> tuple[TeacherAdapter, Callable[[], Path], int]:
    """
    Everything that can be known to be wrong before a weight is read.

    Returns:
        the teacher's adapter, what fetches its checkpoint, and the length of a prompt.

    Raises:
        ValueError: a one-line reason.
    """
    for method in settings.methods:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if settings.text is not None and not settings.text.is_file():
        raise ValueError(f"{settings.text}: no such file")
    if settings.methods and not settings.built_in and not settings.probe_files:
        raise ValueError("no probes: pass a JSONL file, or leave the built-in ones on")
    config, fetch = find_checkpoint(settings.teacher, settings.revision)
    adapter = adapter_for(config)
    native = config.max_position_embeddings
    length = settings.length or min(DEFAULT_LENGTH, native)
    if length > native:
        raise ValueError(f"length {length} is more than the {native} positions that the teacher was made for")
    if settings.forms is not None:
        check_forms(settings.forms, adapter, settings.options or {})
    return adapter, fetch, length


class Unfinished:
    """
    What an interrupted `score` had done: aligned forms and finished probes, in a hidden folder beside the output.

    The same command goes on from there; another one starts anew.
    """

    def __init__(self, output: Path, settings: ScoreSettings):
        self.folder = output.absolute().parent / f".{output.name}.unfinished"
        read = [file for file in (settings.text, settings.forms, *settings.probe_files) if file]
        versions = [[file.stat().st_size, file.stat().st_mtime] for file in read]
        self.record = json.dumps({"settings": asdict(settings), "files": versions}, default=str)
        self.forms, self.probes, self.settings = (
            self.folder / name for name in ("head_forms.safetensors", "probes.json", "settings.json")
        )

    def open(self) -> None:
        """Forget what another command had done."""
        if not self.settings.is_file() or self.settings.read_text() != self.record:
            self.close()
            self.folder.mkdir(parents=True)
            with whole_file(self.settings) as partial:
                partial.write_text(self.record)

    def finished(self) -> list[ProbeResult]:
        """The probes measured before."""
        if not self.probes.is_file():
            return []
        return [ProbeResult(**result) for result in json.loads(self.probes.read_text())]

    def keep(self, results: Sequence[ProbeResult]) -> None:
        """Keep the probes measured so far."""
        with whole_file(self.probes) as partial:
            partial.write_text(json.dumps([asdict(result) for result in results]))

    def close(self) -> None:
        """Nothing is unfinished any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def score_to_folder(
    settings: ScoreSettings,
    output: Path,
    make_forms: MakeForms,
    overwrite: bool = False,
    on_stage: Callable[[str, int | None], Callable[[], None]] = lambda name, total: lambda: None,
) -> HeadScores:
    """
    Score a teacher's heads and write `head_scores.json`, pictures and, where they were made here, the aligned forms.

    Interrupted, the same call goes on where the last probe was finished.

    Args:
        make_forms: aligns the heads where a method needs forms and no file holds them.
        on_stage: told what begins and in how many steps; gives what to call after each.

    Raises:
        ValueError: see `check_settings` and `score_heads`.
    """
    check_free(output, overwrite)
    adapter, fetch, length = check_settings(settings)
    checkpoint = fetch()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text_ids = read_text(tokenizer, settings)
    probes = [probe for file in settings.probe_files for probe in jsonl_probes(file, tokenizer)]
    if settings.built_in:
        probes = built_in_probes(tokenizer, text_ids, length, settings.pairs, settings.seed) + probes

    unfinished = Unfinished(output, settings)
    unfinished.open()
    on_stage("reading the teacher", None)
    teacher = load_teacher(checkpoint, settings)
    made, forms = None, None
    if set(settings.methods) & set(NEEDS_FORMS):
        if settings.forms is not None:
            tensors, options = load_forms(settings.forms, adapter)
        else:
            blank = [[0] * adapter.num_heads] * adapter.num_layers
            options = options_of(student_config(adapter, blank, **settings.options or {}))
            if not unfinished.forms.is_file():
                save_forms(make_forms(teacher, tokenizer, text_ids, options), options, unfinished.forms)
            made = tensors, _ = load_forms(unfinished.forms, adapter)
        forms = running_forms(adapter, tensors, options, teacher)
    rows = text_rows(text_ids)
    steps = score_steps(probes, settings.methods, len(rows))
    scores = score_heads(
        teacher,
        tokenizer,
        probes,
        on_stage("score heads", steps),
        methods=settings.methods,
        head_forms=forms,
        text_rows=rows if forms is not None else (),
        shortlist=settings.shortlist,
        revision=settings.revision,
        seed=settings.seed,
        done=unfinished.finished(),
        on_probe=unfinished.keep,
    )
    if settings.evidence:
        pairs = knockout_pairs(probes, scores)
        points = knockout_points(len(settings.methods), adapter.num_layers * adapter.num_heads)
        points *= len(pairs) * (1 if forms is None else 2)
        scores = with_evidence(teacher, scores, settings.methods, pairs, forms, on_stage("replace many heads", points))
    with whole_folder(output, overwrite) as partial:
        scores.save(partial / "head_scores.json")
        draw_scores(scores, partial)
        if made is not None:
            save_forms(*made, partial / "head_forms.safetensors")
    unfinished.close()
    return scores


def load_teacher(checkpoint: Path, settings: ScoreSettings) -> PreTrainedModel:
    """The teacher in eval mode; on a GPU as much of it as fits, the rest off-loaded."""
    device = settings.device or ("auto" if torch.cuda.is_available() else "cpu")
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device).eval()


def score_steps(probes: Sequence[Probe], methods: Sequence[str], text_rows: int) -> int:
    """At most how often `score_heads` calls back."""
    steps, seen = text_rows if "replacement" in methods else 0, set()
    for probe in probes:
        also = [m for m in methods if "receiver" not in m and m != "sender"]
        also = [m for m in also if m not in CLEAN_ONLY or probe.name not in seen]
        seen.add(probe.name)
        steps += len(probe.pairs) * (1 + len(also))
    return steps


def knockout_pairs(probes: Sequence[Probe], scores: HeadScores) -> dict[str, list[Pair]]:
    """Prompts to knock heads out on: those of every usable form whose answers are generated, once."""
    used = {probe.name for probe in scores.probes if probe.used}
    pairs: dict[str, list[Pair]] = {}
    for probe in probes:
        if probe.name in used and probe.name not in pairs and probe.generated:
            pairs[probe.name] = list(probe.pairs)
    return pairs


def draw_scores(scores: HeadScores, folder: Path) -> None:
    """`head_maps.png` of all methods with each one's best eighth outlined, and the evidence."""
    layers, width = len(scores.scores), len(scores.scores[0])
    best = max(1, round(TOP_SHARE * layers * width))
    maps, masks = {}, {}
    for method in scores.methods():
        found = scores.using(method)
        maps[method] = found.scores
        masks[method] = as_masks(ranking(found.scores, found.tie_break)[:best], layers, width)
    plot_head_maps(
        maps, masks, f"{scores.teacher}: scores; red: each method's best {best} heads", folder / "head_maps.png"
    )
    if any(scores.evidence.get("stability", {}).values()):
        title = f"{scores.teacher}: do halves of the pairs agree"
        plot_stability(scores.evidence["stability"], title, folder / "stability.png")
    for kind, what in (("ablation", "writing their mean"), ("conversion", "replaced by their linear forms")):
        if scores.evidence.get(kind):
            title = f"{scores.teacher}: accuracy by generation, heads {what}"
            plot_knockout(scores.evidence[kind], title, folder / f"{kind}.png")


def parse_heads(texts: Sequence[str]) -> list[tuple[int, int]]:
    """
    Heads from `LAYER.HEAD` words, separated by commas: `3.5,3.7`.

    Raises:
        ValueError: one is not of this form.
    """
    heads = []
    for word in ",".join(texts).split(","):
        layer, _, head = word.strip().partition(".")
        if not word.strip():
            continue
        if not (layer.isdigit() and head.isdigit()):
            raise ValueError(f"{word.strip()!r}: expected LAYER.HEAD, such as 3.5")
        heads.append((int(layer), int(head)))
    return heads


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """
    Weights of capabilities from `NAME=NUMBER` words.

    Raises:
        ValueError: one is not of this form, or negative.
    """
    weights = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"{text!r}: expected NAME=NUMBER, such as language=0.5") from None
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"{text!r}: a weight must be 0 or more")
    return weights


def read_scores(
    files: Sequence[Path], method: str | None = None, weights: Mapping[str, float] | None = None
) -> HeadScores:
    """
    One ranking from one or several score files of the same teacher.

    Args:
        method: of those measured; the first file's by default.
        weights: of capabilities, in place of those in the files.

    Raises:
        ValueError: see `HeadScores.load`, `merge` and `using`; or a weight for a capability that was not measured.
    """
    scores = HeadScores.load(files[0])
    for file in files[1:]:
        scores = scores.merge(HeadScores.load(file))
    known = sorted({probe.capability for probe in scores.probes})
    unknown = sorted(set(weights or {}) - set(known))
    if unknown:
        raise ValueError(f"no capability {unknown[0]!r} was measured; measured: {', '.join(known)}")
    if weights:
        scores = replace(scores, weights=scores.weights | weights)
    return scores.using(method or scores.method) if method or weights else scores


@dataclass(frozen=True)
class Exchange:
    """
    What greedy exchange needs to judge a choice of heads by.

    Attributes:
        teacher: Hub id or folder.
        forms: aligned forms of its heads.
        rounds: exchanges at most.
        text, length, device, dtype, revision: as in `ScoreSettings`.
    """

    teacher: str
    forms: Path
    rounds: int = 16
    text: Path | None = None
    length: int | None = None
    device: str | None = None
    revision: str | None = None


def exchange_heads(
    scores: HeadScores, masks: Masks, exchange: Exchange, budget_unit: str, fixed: set[Head], seed: int
) -> tuple[Masks, list[dict]]:
    """
    Improve a choice by greedy exchange on needles and plain text (`replacement.search_masks`).

    Raises:
        ValueError: see `check_settings`; or the scores are of another shape than the teacher.
    """
    settings = ScoreSettings(
        exchange.teacher,
        (),
        length=exchange.length,
        text=exchange.text,
        forms=exchange.forms,
        device=exchange.device,
        revision=exchange.revision,
    )
    adapter, fetch, length = check_settings(settings)
    if (len(masks), len(masks[0])) != (adapter.num_layers, adapter.num_heads):
        raise ValueError(
            f"the scores are of {len(masks)} layers of {len(masks[0])} heads, {exchange.teacher} has "
            f"{adapter.num_layers} of {adapter.num_heads}"
        )
    checkpoint = fetch()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text_ids = read_text(tokenizer, settings)
    teacher = load_teacher(checkpoint, settings)
    forms = running_forms(adapter, *load_forms(exchange.forms, adapter), teacher)
    pairs = [
        pair
        for keys in NIAH_KEYS
        for pair in niah_probe(tokenizer, text_ids, length, num_keys=keys, num_pairs=4, seed=seed + 1).pairs
    ]
    size = adapter.num_heads // adapter.num_kv_heads if budget_unit == "kv_groups" else 1
    return search_masks(
        teacher,
        forms,
        masks,
        pairs,
        text_rows(text_ids),
        unit_size=size,
        fixed=fixed,
        max_exchanges=exchange.rounds,
    )


def read_text(tokenizer, settings: ScoreSettings) -> np.ndarray:
    """Token ids of the text to measure on."""
    documents = load_corpus("train") if settings.text is None else [settings.text.read_text(encoding="utf-8")]
    return encode_corpus(tokenizer, documents)


def text_rows(text_ids: np.ndarray) -> list[list[int]]:
    """Rows of plain text for the KL."""
    row = min(TEXT_LENGTH, len(text_ids) // TEXT_ROWS)
    return [text_ids[index * row : (index + 1) * row].tolist() for index in range(TEXT_ROWS)]


def running_forms(adapter: TeacherAdapter, tensors: Forms, options: dict, teacher: PreTrainedModel) -> FormOutputs:
    """Forms ready to stand in for the teacher's heads, where the teacher runs."""
    blank = [[0] * adapter.num_heads] * adapter.num_layers
    forms = FormOutputs(student_config(adapter, blank, **options), tensors)
    return forms.to(home(teacher)).eval().requires_grad_(False)


def select_to_file(
    files: Sequence[Path],
    output: Path,
    ratio: float,
    strategy: str,
    budget_unit: str,
    *,
    method: str | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    tensor_parallel: int = 1,
    seed: int = 0,
    weights: Sequence[str] = (),
    exchange: Exchange | None = None,
) -> tuple[Masks, list[str]]:
    """
    Choose heads and write `output` (JSON masks) and, beside it, a picture of the choice.

    Args:
        exchange: improve the choice by greedy exchange.

    Returns:
        the masks, and what they keep and cost, line by line.

    Raises:
        ValueError: see `read_scores` and `select_heads`.
    """
    if output.suffix != ".json":
        raise ValueError(f"{output}: expected a name that ends in .json")
    if exchange is not None and tensor_parallel > 1:
        raise ValueError(
            "greedy exchange moves heads between layers: it cannot keep equal shares for tensor parallelism"
        )
    scores = read_scores(files, method, parse_weights(weights))
    kept, dropped = parse_heads(keep), parse_heads(drop)
    masks = select_heads(
        scores, ratio, strategy, budget_unit, seed, keep=kept, drop=dropped, tensor_parallel=tensor_parallel
    )
    lines = []
    if exchange is not None:
        masks, history = exchange_heads(scores, masks, exchange, budget_unit, {*kept, *dropped}, seed)
        lines = [
            f"after {record['trials']} conversions: needles {record['accuracy']:.2f}, answer loss "
            f"{record['answer_loss']:.3f}, text divergence {record['divergence']:.3f} (untrained)"
            for record in (history[0], history[-1])
        ]
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as partial:
        partial.write_text(json.dumps(masks) + "\n")
    title = f"{public_name(scores.teacher)}: {scores.method} score, {strategy}, {ratio:g} of {budget_unit}"
    plot_head_map(scores.scores, masks, title, output.with_suffix(".png"))
    return masks, lines + describe_choice(scores, masks, strategy, budget_unit)


def describe_choice(scores: HeadScores, masks: Masks, strategy: str, budget_unit: str) -> list[str]:
    """What a choice keeps and costs, what the same cache would buy otherwise, and warnings: lines of text."""
    cost = selection_cost(scores, masks)
    lines = [
        f"full attention: {cost.full_attention_heads} of {cost.heads} query heads "
        f"({cost.full_attention_heads / cost.heads:.1%}), in {cost.kv_heads} of {cost.all_kv_heads} KV heads",
        f"cache: {cost.kv_bytes_per_token:,} bytes per token in bf16 (teacher {cost.teacher_kv_bytes_per_token:,}: "
        f"{cost.kv_bytes_per_token / cost.teacher_kv_bytes_per_token:.1%}), {cost.state_bytes:,} bytes of state",
    ]
    if strategy in BY_SCORE:
        unit, other = same_cache_in_other_unit(scores, masks, strategy, budget_unit)
        count = sum(map(sum, other))
        lines.append(f"the same cache, budgeted in {unit}: {count} query heads ({count / cost.heads:.1%})")
        if cost.decided_by_tie_break > cost.full_attention_heads / 2:
            lines.append(
                f"warning: {cost.decided_by_tie_break} of the {cost.full_attention_heads} heads were decided by "
                f"tie-break (attention distance), not by their {scores.method} score"
            )
    return lines + [f"warning: {warning}" for warning in scores.warnings]
