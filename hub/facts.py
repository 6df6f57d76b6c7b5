"""What a student's folder records, read once for its card."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..configuration_hydrahead import HydraHeadConfig
from ..console import first_line
from ..evaluation.report import read_report
from ..loading import load_student_config
from ..provenance import Record
from .folder import MADE_FROM, STATED, check_student, read_made_from


@dataclass(frozen=True)
class Facts:
    """
    Attributes:
        made_from: as in `hub.checkpoint.save_checkpoint`.
        stated: what whoever publishes the student says of it, as `hub.card.state` writes it; or nothing.
        report: of an evaluation, as `evaluation.report` describes it; or `None`.
        parameters: by dtype, how many the weights' files hold; tied ones once.
        has_template: whether the tokenizer has a chat template.
    """

    config: HydraHeadConfig
    made_from: Mapping
    stated: Mapping
    report: Mapping | None
    parameters: Mapping[str, int]
    has_template: bool = False

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        """
        Raises:
            ValueError: the folder is no student's, or does not say what it was made from.
        """
        check_student(folder)
        made_from, stated = read_made_from(folder), Record(folder / STATED).read() or {}
        report, config = read_report(folder), load_student_config(folder)
        if made_from is None:
            raise ValueError(f"{folder}: no student that says what it was made from ({MADE_FROM})")
        tokenizer = folder / "tokenizer_config.json"
        has_template = (folder / "chat_template.jinja").is_file()
        has_template |= tokenizer.is_file() and '"chat_template"' in tokenizer.read_text(encoding="utf-8")
        return cls(config, made_from, stated, report, count_parameters(folder), has_template)

    @cached_property
    def scored(self) -> Mapping:
        """What the heads were scored, as `HeadScores.brief` gives it; nothing, where nobody says."""
        of_report = (self.report or {}).get("heads") or {}
        known = of_report if of_report.get("masks") == self.config.head_masks and "scores" in of_report else {}
        return self.made_from["masks"].get("scored") or known

    @cached_property
    def trained(self) -> list[Mapping]:
        """What every stage says of itself, in order; of a quick alignment, what its forms say."""
        forms = self.made_from["forms"]
        return [*([{"stage": "align"} | forms] if "steps" in forms else []), *self.made_from["stages"]]


def count_parameters(folder: Path) -> dict[str, int]:
    """
    Parameters in the safetensors files of a folder by dtype, as the files name it (BF16); no tensor is read.

    Raises:
        ValueError: a file cannot be read.
    """
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = file.get_slice(name)
                    counts[tensor.get_dtype()] = counts.get(tensor.get_dtype(), 0) + prod(tensor.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({first_line(error)})") from None
    return counts
