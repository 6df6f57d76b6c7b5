"""From a pretrained transformer to a HydraHead checkpoint."""

from .migration import convert_model

__all__ = ["convert_model"]
