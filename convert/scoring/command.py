"""Scores from a teacher's name to a folder on disk: `hydrahead score`, and the exchanges of `hydrahead select`."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ...data.corpus import encode_corpus, load_corpus
from ...evaluation.figures import plot_head_maps, plot_knockout, plot_stability
from ...files import atomic_file, atomic_folder, check_free, read_utf8
from ...kernels import use_tuned_kernels
from ..forms import FormOutputs, check_forms, load_forms, save_forms
from ..hooks import Head
from ..masks import Exchange
from ..migration import Forms, options_of, student_config
from ..search import search_masks
from ..selection import Masks
from ..teachers import Teacher, TeacherAdapter, open_teacher
from .evidence import TOP_SHARE, as_masks, knockout_points, ranking, with_evidence
from .measure import score_heads, score_steps
from .methods import METHODS
from .probes import NIAH_KEYS, Pair, Probe, built_in_probes, check_length, jsonl_probes, niah_probe
from .scores import HeadScores, ProbeResult
from .settings import ScoreSettings, check_options

DEFAULT_LENGTH = 4096
TEXT_ROWS, TEXT_LENGTH = 4, 512
MakeForms = Callable[[PreTrainedModel, object, np.ndarray, dict], Forms]
"""Teacher, tokenizer, text ids, student's options: aligned forms. How is not this package's business."""


def check_settings(settings: ScoreSettings) -> tuple[Teacher, object, int]:
    """
    Everything that can be known to be wrong before a weight is read.

    Returns:
        the teacher, its tokenizer, and the length of a prompt.

    Raises:
        ValueError: a one-line reason.
    """
    check_options(settings)
    teacher = open_teacher(settings.teacher, settings.revision)
    adapter, native = teacher.adapter, teacher.config.max_position_embeddings
    length = min(DEFAULT_LENGTH, native) if settings.length is None else settings.length
    if length > native:
        raise ValueError(f"length {length} is more than the {native} positions that the teacher was made for")
    if settings.forms is not None:
        check_forms(settings.forms, adapter, settings.options or {})
    else:
        student_config(adapter, [[0] * adapter.num_heads] * adapter.num_layers, **settings.options or {})
    if isinstance(settings.device, str):  # not a `device_map`, which names modules
        check_device(settings.device)
    tokenizer = teacher.tokenizer()
    if settings.built_in:
        check_length(tokenizer, length)
    return teacher, tokenizer, length


def check_device(name: str) -> None:
    """
    Raises:
        ValueError: there is no such device here.
    """
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError
    except (RuntimeError, AssertionError):  # what PyTorch raises depends on how it was built
        raise ValueError(
            f"device {name}: not on this machine, or not one that this PyTorch was built for; leave --device out, or "
            "pass cpu"
        ) from None


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
            with atomic_file(self.settings) as partial:
                partial.write_text(self.record)

    def finished(self) -> list[ProbeResult]:
        """The probes measured before."""
        if not self.probes.is_file():
            return []
        return [ProbeResult(**result) for result in json.loads(self.probes.read_text())]

    def keep(self, results: Sequence[ProbeResult]) -> None:
        """Keep the probes measured so far."""
        with atomic_file(self.probes) as partial:
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
    opened, tokenizer, length = check_settings(settings)
    adapter = opened.adapter
    opened.fetch()
    text_ids = read_text(tokenizer, settings)
    probes = [probe for file in settings.probe_files for probe in jsonl_probes(file, tokenizer)]
    if settings.built_in:
        probes = built_in_probes(tokenizer, text_ids, length, settings.pairs, settings.seed) + probes

    unfinished = Unfinished(output, settings)
    unfinished.open()
    on_stage("reading the teacher", None)
    teacher = load_teacher(opened, settings)
    made, forms = None, None
    if any(METHODS[method].needs_forms for method in settings.methods):
        if settings.forms is not None:
            tensors, options = load_forms(settings.forms, adapter)
        else:
            blank = [[0] * adapter.num_heads] * adapter.num_layers
            options = options_of(student_config(adapter, blank, **settings.options or {}))
            if not unfinished.forms.is_file():
                save_forms(make_forms(teacher, tokenizer, text_ids, options), options, unfinished.forms)
            made = tensors, _ = load_forms(unfinished.forms, adapter)
        forms = running_forms(adapter, tensors, options)
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
    with atomic_folder(output, overwrite) as partial:
        scores.save(partial / "head_scores.json")
        draw_scores(scores, partial)
        if made is not None:
            save_forms(*made, partial / "head_forms.safetensors")
    unfinished.close()
    return scores


def load_teacher(teacher: Teacher, settings: ScoreSettings) -> PreTrainedModel:
    """The teacher as the settings ask for it."""
    use_tuned_kernels()
    return teacher.load(settings.dtype, settings.device)


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
        maps, masks, f"{scores.teacher}: scores; framed: each method's best {best} heads", folder / "head_maps.png"
    )
    if any(scores.evidence.get("stability", {}).values()):
        title = f"{scores.teacher}: do halves of the pairs agree"
        plot_stability(scores.evidence["stability"], title, folder / "stability.png")
    for kind, what in (("ablation", "writing their mean"), ("conversion", "replaced by their linear forms")):
        if scores.evidence.get(kind):
            title = f"{scores.teacher}: accuracy by generation, heads {what}"
            plot_knockout(scores.evidence[kind], title, folder / f"{kind}.png")


def exchange_heads(
    scores: HeadScores, masks: Masks, exchange: Exchange, budget_unit: str, fixed: set[Head], seed: int
) -> tuple[Masks, list[dict]]:
    """
    Improve a choice by greedy exchange on needles and plain text (`search.search_masks`).

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
    opened, tokenizer, length = check_settings(settings)
    adapter = opened.adapter
    if (len(masks), len(masks[0])) != (adapter.num_layers, adapter.num_heads):
        raise ValueError(
            f"the scores are of {len(masks)} layers of {len(masks[0])} heads, {exchange.teacher} has "
            f"{adapter.num_layers} of {adapter.num_heads}"
        )
    text_ids = read_text(tokenizer, settings)
    teacher = load_teacher(opened, settings)
    forms = running_forms(adapter, *load_forms(exchange.forms, adapter))
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
    documents = load_corpus("train") if settings.text is None else [read_utf8(settings.text)]
    return encode_corpus(tokenizer, documents)


def text_rows(text_ids: np.ndarray) -> list[list[int]]:
    """Rows of plain text for the KL."""
    row = min(TEXT_LENGTH, len(text_ids) // TEXT_ROWS)
    return [text_ids[index * row : (index + 1) * row].tolist() for index in range(TEXT_ROWS)]


def running_forms(adapter: TeacherAdapter, tensors: Forms, options: dict) -> FormOutputs:
    """Forms ready to stand in for the teacher's heads; they go where its layers run."""
    blank = [[0] * adapter.num_heads] * adapter.num_layers
    forms = FormOutputs(student_config(adapter, blank, **options), tensors)
    return forms.eval().requires_grad_(False)
