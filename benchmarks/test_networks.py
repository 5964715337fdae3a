"""Training steps of whole networks, with our operator and with the published one."""

from __future__ import annotations

import pytest
import torch

from . import networks
from .measure import synchronise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 96 if DEVICE == "cuda" else 64


@pytest.mark.parametrize("implementation", ["acs_triton", "acsconv"])
@pytest.mark.parametrize("name", networks.NAMES)
def test_network(benchmark, name, implementation):
    benchmark.group = f"{name} {SIZE}^3"
    x = torch.randn(1, networks.in_channels(name), SIZE, SIZE, SIZE, device=DEVICE)
    step = networks.training_step(networks.pair(name)[implementation].to(DEVICE), x)

    def run():
        step()
        synchronise(DEVICE)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {
        "layer": benchmark.group,
        "layout": "ncdhw",
        "phase": "train",
        "implementation": implementation,
        "median_ms": benchmark.stats.stats.median * 1e3,
    }
