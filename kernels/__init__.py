"""Configurations of fla's kernels as `benchmarks/tune_kernels.py` found them on a Hopper GPU, so that nobody waits."""

import os
from pathlib import Path


def use_tuned_kernels() -> None:
    """
    Have fla take the configurations that lie here, on GPUs like the one that they were tuned on, instead of tuning.

    Without them the first forward pass takes most of a minute and the first backward pass minutes. Call it before fla
    is imported; what the user has set is left alone.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        os.environ.setdefault("FLA_CONFIG_DIR", str(Path(__file__).parent / "hopper"))
        os.environ.setdefault("FLA_CACHE_MODE", "fuzzy")  # other sizes take what was found for the nearest form
