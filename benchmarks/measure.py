"""Timing steps side by side, and the limits of the machine they run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from statistics import median

import torch
import torch.nn.functional as F


def synchronise(device: torch.device | str) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def alternate(steps: Mapping[str, Callable[[], object]], rounds: int, device="cpu") -> dict[str, float]:
    """Median seconds of each step over ``rounds`` turns in which all of them run, after one uncounted turn.

    What slows the machine down for a while slows all of them down. The order within a turn is
    random: a step that follows one of its like finds its memory ready.
    """
    order = Random(0)
    seconds = {name: [] for name in steps}
    for turn in range(1 + rounds):
        for name, step in order.sample(list(steps.items()), len(steps)):
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


@dataclass(frozen=True)
class Limits:
    """What the machine reaches: multiply-adds and bytes a second."""

    multiply_adds: float
    copied_bytes: float

    def bound(self, multiply_adds: int, moved_bytes: int) -> float:
        """Seconds that work and traffic take at least, where the two overlap."""
        return max(multiply_adds / self.multiply_adds, moved_bytes / self.copied_bytes)


def limits(device="cpu", dtype=torch.float32, seconds: float = 0.5) -> Limits:
    """Measure them: the best of a matrix product and a convolution whose channels fill every vector, and a copy."""
    side = 2048 if torch.device(device).type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    images = torch.randn(16, 64, 96, 96, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
    source = torch.randn(1 << 25, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        product = _best(lambda: matrix @ matrix, device, seconds)
        convolution = _best(lambda: F.conv2d(images, kernel, padding=1), device, seconds)
        copy = _best(lambda: target.copy_(source), device, seconds)
    return Limits(max(side**3 / product, images.numel() * 64 * 9 / convolution), 2 * source.numel() * 4 / copy)


def _best(step: Callable[[], object], device, seconds: float) -> float:
    step()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        step()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def training_step(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward pass with gradients of all parameters, and of ``x`` where it asks for one."""
    ones = torch.ones_like(model(x).detach())

    def step():
        for tensor in (x, *model.parameters()):
            tensor.grad = None
        y = model(x)
        y.backward(ones)
        return y.detach()

    return step


def inference(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The forward pass alone."""
    model, x = model.eval(), x.detach()

    @torch.inference_mode()
    def step():
        return model(x)

    return step
