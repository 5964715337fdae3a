"""Deterministic mode is honoured, and the same call gives the same bits."""

import pytest
import torch
from torch import nn

from acs_triton.operators import ACSConv, SoftACSConv

CASES = {
    "stride 1": (ACSConv, {"padding": 1}),
    "stride 2": (ACSConv, {"padding": 1, "stride": 2}),
    "valid": (ACSConv, {}),
    "groups": (ACSConv, {"padding": 1, "groups": 2}),
    "depthwise": (ACSConv, {"padding": 1, "groups": 8}),
    "replicate": (ACSConv, {"padding": 2, "padding_mode": "replicate"}),
    "soft": (SoftACSConv, {"padding": 1}),
    "soft, three views": (SoftACSConv, {}),
}


@pytest.fixture
def deterministic():
    """Deterministic mode, in which PyTorch also fills uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def step(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_five_runs_are_bitwise_equal(case, dtype, deterministic):
    kind, options = CASES[case]
    layer = kind(8, 16, 3, dtype=dtype, **options)
    x = torch.randn(3, 8, 10, 12, 9).to(dtype)
    first = step(layer, x)
    assert all(one.isfinite().all() for one in first)
    for _ in range(4):
        assert all(torch.equal(one, other) for one, other in zip(first, step(layer, x), strict=True))


def test_five_trainings_with_two_threads_are_bitwise_equal(deterministic):
    def train():
        torch.manual_seed(1)
        net = nn.Sequential(ACSConv(2, 6, 3, padding=1), nn.ReLU(), ACSConv(6, 2, 3, padding=1, stride=2))
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(2, 2, 8, 8, 8)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [train() for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0], run) for run in runs[1:])
