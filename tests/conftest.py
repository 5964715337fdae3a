"""Settings for the whole suite: hypothesis profiles and shared helpers."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from acs_triton import backends

settings.register_profile("default", max_examples=200, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "fuzz", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


def pytest_configure(config):
    """``pytest -m fuzz``: the property tests with 2,000 examples each, drawn anew each time."""
    if config.option.markexpr == "fuzz":
        settings.load_profile("fuzz")


# The tensors here are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_small_layers(monkeypatch):
    """Small layers are computed as all others are."""
    monkeypatch.setattr(backends, "small_plan", lambda *args: None)
