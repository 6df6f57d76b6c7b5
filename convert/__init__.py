"""From a pretrained transformer to a HydraHead checkpoint."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .migration import convert_model
    from .scoring.measure import score_heads
    from .scoring.scores import HeadScores
    from .selection import select_heads

__all__ = ["HeadScores", "convert_model", "score_heads", "select_heads"]

_MODULES = {
    "HeadScores": "scoring.scores",
    "convert_model": "migration",
    "score_heads": "scoring.measure",
    "select_heads": "selection",
}


def __getattr__(name: str):
    """Imports a part when it is first asked for, so that reading scores and choosing heads do not wait for PyTorch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
