"""What `hydrahead score` is asked for, and what of it can be refused before PyTorch is imported."""

from dataclasses import dataclass
from pathlib import Path

from .methods import METHODS, check_methods


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
        built_in, only: use the built-in probes; those of these names only.
        forms: aligned forms of the heads (`head_forms.safetensors`), where a method needs them; by default what
            `training.quick.align_for_scores` left for these settings.
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
    only: tuple[str, ...] = ()
    forms: Path | None = None
    options: dict | None = None
    align_steps: int = 100
    shortlist: int | None = None
    evidence: bool = True
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0
    revision: str | None = None

    @property
    def needs_forms(self) -> bool:
        """Whether a method measures aligned forms of the heads."""
        return any(METHODS[method].needs_forms for method in self.methods)


@dataclass(frozen=True)
class Exchange(ScoreSettings):
    """What greedy exchange judges a choice of heads by: of the same settings no methods, and exchanges at most."""

    methods: tuple[str, ...] = ()
    rounds: int = 16


def check_options(settings: ScoreSettings) -> None:
    """
    What is wrong whatever the teacher.

    Raises:
        ValueError: an unknown method, a missing file, or no probes; one line.
    """
    check_methods(settings.methods)
    for file in (settings.text, settings.forms, *settings.probe_files):
        if file is not None and not file.is_file():
            raise ValueError(f"{file}: no such file")
    if settings.methods and not settings.built_in and not settings.probe_files:
        raise ValueError("no probes: pass a JSONL file, or leave the built-in ones on")
