"""The order of the rooms: what a file imports stands before it, and nothing imports the demo."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOT_FILES = {"console", "files", "provenance"}
MODEL = {"configuration_hydrahead", "modeling_hydrahead", "ops_hydrahead"}
# What each room may import beside itself. A file at the root is a room of its own.
ROOMS = {
    "configuration_hydrahead": set(),
    "kernels_hydrahead": set(),
    "ops_hydrahead": {"kernels_hydrahead"},
    "modeling_hydrahead": {"configuration_hydrahead", "ops_hydrahead"},
    "auto": MODEL,
    "console": set(),
    "files": set(),
    "provenance": {"files"},
    "kernels": set(),
    "loading": {"console", "files", *MODEL},
    "usage": set(),
    "data": ROOT_FILES,
    "evaluation": {*ROOT_FILES, "kernels", "loading", "data"},
    "serving": {"configuration_hydrahead"},
    "hub": {*ROOT_FILES, "loading", "evaluation", "serving", *MODEL},
    "convert": {*ROOT_FILES, "kernels", "loading", "data", "evaluation", "hub", *MODEL},
    "training": {*ROOT_FILES, "kernels", "loading", "data", "evaluation", "hub", "convert", *MODEL},
    "pipeline": {*ROOT_FILES, "loading", "data", "evaluation", "hub", "convert", "training", "usage", *MODEL},
    "commands": {*ROOT_FILES, "evaluation", "hub", "convert", "training", "pipeline"},
    "cli": {"console", "commands"},
}
FILES = [
    path
    for room in ROOMS
    for path in ([ROOT / f"{room}.py"] if (ROOT / f"{room}.py").is_file() else sorted((ROOT / room).rglob("*.py")))
]


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, wherever in it: `from ..convert.forms import x` is `convert`."""
    package, rooms = path.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            rooms |= {inside[0]} if inside[0] else {alias.name for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            rooms |= {name.split(".")[1] for name in names if name.startswith("hydrahead.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_a_room_above_its_own(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    assert imported_rooms(path) - {own} <= ROOMS[own]


def test_every_room_is_known():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.glob("*/*.py")}
    hidden = {name for name in rooms if name.startswith(".")}
    assert rooms - hidden - {"tests", "benchmarks", "demo", "build"} <= set(ROOMS)
