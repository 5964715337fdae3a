"""``python -m benchmarks.overhead``: the cost of one call beside its arithmetic, and of the import.

A layer on tiny tensors against what it must do at least: three ``conv3d`` calls and a ``cat``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from acs_triton.operators import ACSConv

from .measure import alternate

CALLS = 200


def three_convolutions(layer: ACSConv) -> Callable[[Tensor], Tensor]:
    """The same numbers from three ``conv3d`` calls and a ``cat``, of weights cut beforehand."""
    weights, biases = layer.weight.detach().split(2), layer.bias.detach().split(2)
    kernels = [weight.unsqueeze(view + 2).requires_grad_() for view, weight in enumerate(weights)]
    biases = [bias.clone().requires_grad_() for bias in biases]
    paddings = ((0, 1, 1), (1, 0, 1), (1, 1, 0))

    def run(x: Tensor) -> Tensor:
        parts = zip(kernels, biases, paddings, strict=True)
        return torch.cat([F.conv3d(x, kernel, bias, 1, padding) for kernel, bias, padding in parts], 1)

    return run


def calls(forward: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Callable[[], None]:
    """A step of many calls."""
    if not backward:

        @torch.no_grad()
        def step():
            for _ in range(CALLS):
                forward(x)

        return step
    ones = torch.ones_like(forward(x).detach())

    def step():
        for _ in range(CALLS):
            forward(x).backward(ones)

    return step


def per_call(rounds: int = 9) -> dict[str, dict[str, float]]:
    """Microseconds of a forward call, and of a forward and a backward call, each way."""
    torch.manual_seed(0)
    layer = ACSConv(4, 6, 3, padding=1)
    x = torch.randn(1, 4, 4, 4, 4, requires_grad=True)
    both = {"acs_triton": layer, "three conv3d and cat": three_convolutions(layer)}
    torch.testing.assert_close(*(forward(x) for forward in both.values()))
    result = {}
    for phase, backward in (("forward", False), ("forward and backward", True)):
        times = alternate({name: calls(forward, x, backward) for name, forward in both.items()}, rounds)
        result[phase] = {name: seconds / CALLS * 1e6 for name, seconds in times.items()}
    return result


def import_milliseconds(repeats: int = 5) -> float:
    """Median time that ``import acs_triton`` takes after ``import torch``, in fresh processes."""
    code = "import time, torch; s = time.perf_counter(); import acs_triton; print(time.perf_counter() - s)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
    return median(float(run.stdout) for run in runs) * 1e3


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n\n")[0]).parse_args(argv)
    torch.set_num_threads(1)
    for phase, times in per_call().items():
        ours, least = times.values()
        text = ", ".join(f"{name} {microseconds:.0f} us" for name, microseconds in times.items())
        print(f"{phase}: {text}, ratio {ours / least:.2f}")
    print(f"import of acs_triton after torch: {import_milliseconds():.0f} ms")


if __name__ == "__main__":
    main()
