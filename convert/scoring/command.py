"""Scores from a teacher's name to a folder on disk: `hydrahead score`."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...console import progress
from ...data.corpus import encode_corpus, load_corpus
from ...evaluation.figures import plot_head_maps, plot_knockout, plot_stability
from ...files import atomic_file, atomic_folder, check_free, read_utf8
from ...kernels import use_tuned_kernels
from ...provenance import Record, digest, environment
from ..forms import HeadForms, check_forms, load_forms
from ..options import student_config
from ..teachers import Teacher, open_teacher
from .evidence import TOP_SHARE, as_masks, knockout_points, ranking, with_evidence
from .measure import score_heads, score_steps
from .probes import Pair, Probe, built_in_probes, check_length
from .scores import HeadScores, ProbeResult
from .settings import ScoreSettings, check_options
from .user_probes import jsonl_probes

DEFAULT_LENGTH = 4096
TEXT_ROWS, TEXT_LENGTH = 4, 512


def check_settings(settings: ScoreSettings) -> tuple[Teacher, PreTrainedTokenizerBase, int]:
    """
    Everything that can be known to be wrong before a weight is read.

    Returns:
        the teacher, its tokenizer, and the length of a prompt.

    Raises:
        ValueError: a one-line reason.
    """
    check_options(settings)
    teacher = open_teacher(settings.teacher, settings.revision)
    native = teacher.config.max_position_embeddings
    length = min(DEFAULT_LENGTH, native) if settings.length is None else settings.length
    if length > native:
        raise ValueError(f"length {length} is more than the {native} positions that the teacher was made for")
    if settings.forms is not None:
        check_forms(settings.forms, teacher, settings.options or {})
    else:
        student_config(teacher.adapter, teacher.adapter.blank_masks, **settings.options or {})
    if isinstance(settings.device, str):  # not a `device_map`, which names modules
        check_device(settings.device)
    tokenizer = teacher.tokenizer()
    if settings.built_in:
        check_length(tokenizer, length)
    if settings.text is not None and not read_utf8(settings.text).strip():
        raise ValueError(f"{settings.text}: holds no text")
    for file in settings.probe_files:
        jsonl_probes(file, tokenizer)
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

    The same settings go on from there; others start anew.
    """

    def __init__(self, output: Path, settings: ScoreSettings):
        self.folder = output.absolute().parent / f".{output.name}.unfinished"
        read = (settings.text, settings.forms, *settings.probe_files)
        path = Path(settings.teacher)
        weights = [file.stat() for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))]
        self.settings = {
            "settings": asdict(settings),
            "files": [digest(file) for file in read if file],
            "teacher": [[found.st_size, found.st_mtime_ns] for found in weights],  # which may be much to digest
            "versions": environment()["versions"],
        }
        self.record = Record(self.folder / "settings.json")
        self.forms, self.probes = self.folder / "head_forms.safetensors", self.folder / "probes.json"

    @property
    def has_forms(self) -> bool:
        """Whether forms were aligned for these settings."""
        return self.record.matches(self.settings) and self.forms.is_file()

    def begin(self) -> None:
        """Forget what other settings had left."""
        if not self.record.matches(self.settings):
            self.close()
            self.record.write(self.settings)

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


def score_to_folder(settings: ScoreSettings, output: Path, overwrite: bool = False) -> HeadScores:
    """
    Score a teacher's heads and write `head_scores.json`, pictures and, unless they were given, the forms measured.

    Interrupted, the same call goes on where the last probe was finished.

    Raises:
        ValueError: see `check_settings` and `score_heads`; or a method needs aligned forms, and there are none.
    """
    check_free(output, overwrite)
    opened, tokenizer, length = check_settings(settings)
    text_ids, probes = read_probes(settings, tokenizer, length)
    unfinished = Unfinished(output, settings)
    forms_file = (settings.forms or unfinished.forms) if settings.needs_forms else None
    if forms_file == unfinished.forms and not unfinished.has_forms:
        raise ValueError(
            f"{', '.join(settings.methods)}: needs aligned forms of the heads; pass those of the alignment"
        )
    teacher = load_teacher(opened, settings)
    forms = None if forms_file is None else running_forms(opened, forms_file)
    unfinished.begin()
    rows, done = ([] if forms is None else text_rows(text_ids)), unfinished.finished()
    with progress("score heads", score_steps(probes[len(done) :], settings.methods, len(rows))) as advance:
        scores = score_heads(
            teacher,
            tokenizer,
            probes,
            advance,
            methods=settings.methods,
            head_forms=forms,
            text_rows=rows,
            shortlist=settings.shortlist,
            revision=settings.revision,
            seed=settings.seed,
            done=done,
            on_probe=unfinished.keep,
        )
    if settings.evidence:
        pairs = knockout_pairs(probes, scores)
        points = knockout_points(len(settings.methods), opened.adapter.num_layers * opened.adapter.num_heads)
        points *= len(pairs) * (1 if forms is None else 2)
        with progress("replace many heads", points) as advance:
            scores = with_evidence(teacher, scores, settings.methods, pairs, forms, advance)
    # A model from the Hub, or of a GGUF file, calls itself by the folder that it is kept in.
    scores.teacher, scores.revision = opened.public_name, opened.revision
    scores.made_from = scores_made_from(settings, length, forms_file)
    with atomic_folder(output, overwrite) as partial:
        scores.save(partial / "head_scores.json")
        draw_scores(scores, partial)
        if unfinished.forms.is_file():
            shutil.copyfile(unfinished.forms, partial / unfinished.forms.name)
    unfinished.close()
    return scores


def scores_made_from(settings: ScoreSettings, length: int, forms_file: Path | None) -> dict:
    """What a score file says of what decided it beside the teacher."""
    return {
        **{key: getattr(settings, key) for key in ("pairs", "built_in", "only", "options", "shortlist", "dtype")},
        "length": length,
        "text": text_name(settings),
        "probes": {file.name: digest(file) for file in settings.probe_files},
        "forms": None if forms_file is None else digest(forms_file),
    }


def load_teacher(teacher: Teacher, settings: ScoreSettings) -> PreTrainedModel:
    """The teacher as the settings ask for it."""
    use_tuned_kernels()
    return teacher.load(settings.dtype, settings.device)


def knockout_pairs(probes: Sequence[Probe], scores: HeadScores) -> dict[str, list[Pair]]:
    """Prompts to knock heads out on: those of every usable variant whose answers are generated, once."""
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


def read_text(tokenizer, settings: ScoreSettings) -> np.ndarray:
    """Token ids of the text to measure on."""
    documents = load_corpus("train") if settings.text is None else [read_utf8(settings.text)]
    return encode_corpus(tokenizer, documents)


def read_probes(settings: ScoreSettings, tokenizer, length: int) -> tuple[np.ndarray, list[Probe]]:
    """The text to measure on, and all probes."""
    text_ids = read_text(tokenizer, settings)
    probes = [probe for file in settings.probe_files for probe in jsonl_probes(file, tokenizer)]
    if settings.built_in:
        probes = built_in_probes(tokenizer, text_ids, length, settings.pairs, settings.seed, settings.only) + probes
    return text_ids, probes


def text_name(settings: ScoreSettings) -> str:
    """The text to measure on as records name it."""
    return settings.text.name if settings.text else "the Python standard library"


def text_rows(text_ids: np.ndarray) -> list[list[int]]:
    """Rows of plain text for the KL."""
    row = min(TEXT_LENGTH, len(text_ids) // TEXT_ROWS)
    return [text_ids[index * row : (index + 1) * row].tolist() for index in range(TEXT_ROWS)]


def running_forms(teacher: Teacher, file: Path) -> HeadForms:
    """Forms ready to stand in for the teacher's heads; they go where its layers run."""
    tensors, options = load_forms(file, teacher)
    config = student_config(teacher.adapter, teacher.adapter.blank_masks, **options)
    return HeadForms(config, tensors).eval().requires_grad_(False)
