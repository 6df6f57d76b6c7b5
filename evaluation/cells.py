"""What was measured so far, cell by cell: a cell's file is there whole or not at all."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import atomic_file
from ..provenance import Record, first_difference
from .models import Model

KINDS = {
    "models": ("label",),
    "needles": ("model", "task", "length"),
    "batching": ("model",),
    "text": ("model", "domain", "length"),
    "lm_eval": ("model", "task", "length"),
}
"""Lists of a report, and which of their entries' keys name a cell."""


def check_report(folder: Path, settings: Mapping, models: Sequence[Model]) -> None:
    """
    Whether the report that is in a folder, if any, can hold further cells.

    Args:
        settings: under which cells are measured: what decides their numbers.
        models: that are measured, the report's first among them the first; the report may hold others.

    Raises:
        ValueError: it was made under other settings, against another first model, or of other models by the same
            labels; says which.
    """
    report = Record(folder / "report.json").read()
    if report is None:
        return
    first = next((model["label"] for model in report.get("models", ())), None)
    if first is not None and first != models[0].label:
        raise ValueError(
            f"{folder}: its report compares with {first}: name that model first, or choose another output"
        )
    then = {key: report.get(key) for key in settings}
    now = json.loads(json.dumps(dict(settings)))
    before = {model["label"]: model for model in report.get("models", ())}
    for model in models:
        if model.label in before:
            now[model.label] = model.identity()
            then[model.label] = {key: before[model.label].get(key) for key in now[model.label]}
    if changed := first_difference(then, now):
        raise ValueError(
            f"{folder}: made with another {changed}; choose another output, or have it made anew: remove report.json"
        )


class Cells:
    """
    The cells of the report in a folder, and in a hidden folder beside it those that no report holds yet.

    Cells that could not be measured (`error`) are not done.

    Args, raises: as in `check_report`.
    """

    def __init__(self, folder: Path, settings: Mapping, models: Sequence[Model]):
        self._folder, self.news = folder / ".evaluation", False
        if self._folder.is_symlink():
            raise ValueError(f"{self._folder}: a link, and what is measured would be written elsewhere: remove it")
        labels = [model.label for model in models]
        self._found: dict[tuple, dict] = {}
        self.report = Record(folder / "report.json").read()
        self._unfinished = Record(self._folder / "settings.json")
        if self.report:
            check_report(folder, settings, models)
            labels = [model["label"] for model in self.report["models"]] + labels
            for kind in KINDS:
                self._found |= {self._name(kind, cell): cell for cell in self.report.get(kind, ())}
        self._order = list(dict.fromkeys(labels))
        self._made = {"settings": settings, "models": {model.label: model.identity() for model in models}}
        if self._unfinished.matches(self._made):
            for file in sorted(self._folder.glob("cell-*.json")):
                kind, cell = json.loads(file.read_text())
                self._found[self._name(kind, cell)] = cell
                self.news = True

    @staticmethod
    def _name(kind: str, cell: Mapping) -> tuple:
        return (kind, *(cell[key] for key in KINDS[kind]))

    def is_done(self, kind: str, *name) -> bool:
        """Whether a cell was measured."""
        return "error" not in self._found.get((kind, *name), {"error": "not yet"})

    def keep(self, kind: str, cell: dict) -> None:
        """Write a cell, whole or not at all."""
        if not self._unfinished.matches(self._made):
            self.remove()
            self._unfinished.write(self._made)
        number = len(list(self._folder.glob("cell-*.json")))
        with atomic_file(self._folder / f"cell-{number:05}.json") as partial:
            partial.write_text(json.dumps([kind, cell]))
        self._found[self._name(kind, cell)] = json.loads(json.dumps(cell))
        self.news = True

    def all(self) -> dict[str, list[dict]]:
        """By kind, the cells in the order of the models, by length and as they were measured."""
        kinds: dict[str, list[dict]] = {kind: [] for kind in KINDS}
        for (kind, *_), cell in self._found.items():
            kinds[kind].append(cell)

        def place(cell: dict) -> tuple:
            return self._order.index(cell.get("model", cell.get("label"))), cell.get("length") or 0

        return {kind: sorted(cells, key=place) for kind, cells in kinds.items()}

    def remove(self) -> None:
        """Leave nothing beside the report."""
        shutil.rmtree(self._folder, ignore_errors=True)
