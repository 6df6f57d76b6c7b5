"""Without gradients unless a test asks for them."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def gradients(_without_gradients):
    with torch.enable_grad():
        yield
