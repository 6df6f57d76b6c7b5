"""A student's folder before anything large is imported: what its records are called, and whether it is one."""

import json
from pathlib import Path

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
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no student there (no config.json)")
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({first_line(error)})") from None
    if kind != "hydrahead":
        raise ValueError(f"{folder}: no HydraHead student but a model of type {kind}; hydrahead convert makes one")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
