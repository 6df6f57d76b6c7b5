"""HydraHead: head-level hybrids of full attention and Gated DeltaNet, made from pretrained transformers."""

import os
from typing import TYPE_CHECKING

from .auto import register_now_or_on_import

if TYPE_CHECKING:
    from .configuration_hydrahead import HydraHeadConfig
    from .modeling_hydrahead import HydraHeadForCausalLM, HydraHeadModel

# fla decides when it is imported whether it looks for tuned configurations, and when it runs where (`kernels`).
os.environ.setdefault("FLA_CACHE_MODE", "fuzzy")  # other sizes take what was found for the most similar ones

if __name__ == "hydrahead":  # pytest imports the root of the repository once more, under its folder's name
    register_now_or_on_import()

__version__ = "0.2.0"
__all__ = ["HydraHeadConfig", "HydraHeadForCausalLM", "HydraHeadModel"]


def __getattr__(name: str):
    """Imports the model when it is first asked for, so that `hydrahead --help` does not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import configuration_hydrahead, modeling_hydrahead

    return getattr(configuration_hydrahead if name == "HydraHeadConfig" else modeling_hydrahead, name)
