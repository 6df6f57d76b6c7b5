"""Configurations of fla's kernels as `benchmarks/tune_kernels.py` found them on a Hopper GPU, so that nobody waits."""

import os
from pathlib import Path

import torch

HOPPER = (9, 0)


def use_tuned_kernels() -> None:
    """
    Have fla take the configurations that lie here instead of tuning, on GPUs like the one that they were tuned on.

    Without them the first forward pass on a machine takes most of a minute and the first backward pass minutes. What
    the user has set (`FLA_CONFIG_DIR`, `FLA_CACHE_MODE`) is left alone.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER:
        os.environ.setdefault("FLA_CONFIG_DIR", str(Path(__file__).parent / "hopper"))
