"""From a pretrained transformer to a HydraHead checkpoint."""

from .migration import convert_model
from .scoring import HeadScores, score_heads
from .selection import select_heads

__all__ = ["HeadScores", "convert_model", "score_heads", "select_heads"]
