"""A student's folder before anything large is imported: what its records are called, and whether it is one."""

from pathlib import Path

from ..files import read_json
from ..provenance import Record

MADE_FROM, STATED = "made_from.json", "card.json"


def read_made_from(folder: Path) -> dict | None:
    """What a student folder says it was made from; `None` where it is from before folders said so."""
    return Record(folder / MADE_FROM).read()


def check_student(folder: Path) -> None:
    """
    Raises:
        ValueError: there is no student in the folder.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no student there (no config.json)")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "hydrahead":
        raise ValueError(f"{folder}: no HydraHead student but a model of type {kind}; hydrahead convert makes one")
