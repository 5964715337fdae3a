"""Settings for the whole suite: hypothesis profiles and shared helpers."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("default", max_examples=200, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "fuzz", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")

# The tensors here are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
