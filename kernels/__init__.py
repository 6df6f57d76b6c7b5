"""Configurations of fla's kernels as `benchmarks/tune_kernels.py` found them on a Hopper GPU, so that nobody waits."""

import os
import sys
from pathlib import Path

import torch
from transformers import logging

HOPPER = (9, 0)

logger = logging.get_logger(__name__)


def use_tuned_kernels() -> None:
    """
    Have fla take the configurations that lie here instead of tuning, on GPUs like the one that they were tuned on.

    Without them the first forward pass on a machine takes most of a minute (docs/benchmarks.md), backward longer. What
    the user has set (`FLA_CONFIG_DIR`, `FLA_CACHE_MODE`) is left alone. hydrahead has to be imported before fla, which
    a checkpoint's own code imports too: fla asks once whether it is to look for configurations.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER:
        return
    os.environ.setdefault("FLA_CONFIG_DIR", str(Path(__file__).parent / "hopper"))
    cache = sys.modules.get("fla.ops.utils.cache")
    if cache is not None and cache.FLA_CACHE_MODE is cache.FlaCacheMode.DISABLED:
        logger.warning(
            "fla was imported before hydrahead, or FLA_CACHE_MODE disables it: it tunes its kernels itself."
        )
