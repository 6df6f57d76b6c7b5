"""Bounded, reproducible runs, and one thread unless asked for more: tiny tensors lose time to a second."""

import os
import shutil
import tempfile

# Where the code of checkpoints is copied before it is run: tests side by side would find each other's half written.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

import pytest
import torch
from hypothesis import HealthCheck, settings

from hydrahead.kernels import use_tuned_kernels

use_tuned_kernels()

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

settings.register_profile(
    "hydrahead",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("hydrahead")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """What a test draws, or a model that it builds, does not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield
