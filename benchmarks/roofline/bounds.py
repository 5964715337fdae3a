"""The shortest times that a GPU's data sheet allows for counted work, and what a network's layers need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from triton.runtime import driver

from acs_triton.kernels import device

from ..offline import ARCHS
from ..workloads import PRIMITIVES
from . import layers
from .counts import count
from .launches import CountingDriver, Launch, Operation, distinct_bytes
from .layers import Layer
from .traffic import Work

BOTTLENECKS = ("tensor cores", "FMA", "L2", "DRAM")


@dataclass(frozen=True)
class Gpu:
    """What a GPU's data sheet promises, a second.

    Attributes:
        arch: a key of :data:`benchmarks.offline.ARCHS`.
        matrix: multiply-adds of 16-bit matrix instructions with float32 sums; half as many for tf32.
        scalar: float32 multiply-adds.
        dram: bytes.
        clock: Hz, at which each multiprocessor gets 64 bytes a cycle from L2.
    """

    name: str
    arch: str
    matrix: float
    scalar: float
    dram: float
    clock: float

    @property
    def l2(self) -> float:
        return 64 * self.clock * ARCHS[self.arch].multiprocessors

    def times(self, work: Work, share: float = 1.0, dtype: torch.dtype = torch.float16) -> tuple[float, ...]:
        """Seconds that each of :data:`BOTTLENECKS` needs, where a ``share`` of the multiprocessors works."""
        matrix, scalar = work.matrix, work.scalar
        if device.exact(dtype):  # no matrix instruction multiplies float32 exactly
            matrix, scalar = 0, matrix + scalar
        return (
            matrix / (self.matrix if dtype.itemsize == 2 else self.matrix / 2) / share,
            scalar / self.scalar / share,
            (work.loaded + work.stored) / self.l2 / share,
            (work.read + work.written) / self.dram,
        )


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", "sm_80", 312e12 / 2, 19.5e12 / 2, 2.039e12, 1.41e9),
    "h100": Gpu("H100 SXM", "sm_90", 989.4e12 / 2, 66.9e12 / 2, 3.35e12, 1.83e9),
    "rtx4090": Gpu("RTX 4090", "sm_89", 165.2e12 / 2, 82.6e12 / 2, 1.008e12, 2.52e9),
}


@dataclass(frozen=True)
class Step:
    """One launch or operation: its work, and how many programs do it (None: enough for every multiprocessor)."""

    work: Work
    programs: int | None = None

    def ideal(self, useful: float) -> Step:
        """The step with a share of its multiply-adds, L2 traffic of no cost, and no multiprocessor idle."""
        work = self.work
        matrix, scalar = (round(useful * macs) for macs in (work.matrix, work.scalar))
        return Step(Work(matrix, scalar, 0, 0, work.read, work.written))

    def bound(self, gpu: Gpu, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds, and what takes them."""
        sms = ARCHS[gpu.arch].multiprocessors
        share = 1.0 if self.programs is None else min(1.0, self.programs / sms)
        return max(zip(gpu.times(self.work, share, dtype), BOTTLENECKS, strict=True))


def steps_of(event: Launch | Operation) -> list[tuple[str | None, Step]]:
    """A recorded event's steps; those of a convolution's backward pass with the primitive that they compute."""
    if isinstance(event, Launch):
        return [(None, Step(count(event), event.programs))]
    if event.name == "convolution":
        x, weight = event.arguments[:2]
        (y,) = event.results
        copies, read = _dense(x), _read_by(x, weight, y, event.arguments[3:6])
        work = _products(y, weight, read + distinct_bytes(weight), distinct_bytes(y), event.arguments[-1])
        return [(None, Step(one)) for one in (*copies, work)]
    if event.name == "convolution_backward":
        g, x, weight = event.arguments[:3]
        groups, mask = event.arguments[-2:]
        bytes_g, bytes_w = distinct_bytes(g), distinct_bytes(weight)
        steps = [(None, Step(copy)) for copy in (*_dense(g), *(_dense(x) if mask[1] else []))]
        if mask[0]:
            steps.append(("input_grad", Step(_products(g, weight, bytes_g + bytes_w, distinct_bytes(x), groups))))
        if mask[1]:
            read = _read_by(x, weight, g, event.arguments[4:7])
            steps.append(("weight_grad", Step(_products(g, weight, bytes_g + read, bytes_w, groups))))
        return steps
    return [(None, Step(Work(read=event.read, written=event.written)))]


def _dense(tensor: torch.Tensor) -> list[Work]:
    """The copy that PyTorch makes of an operand that is not contiguous."""
    size = distinct_bytes(tensor)
    return [] if tensor.is_contiguous() else [Work(read=size, written=size)]


def _products(y: torch.Tensor, weight: torch.Tensor, read: int, written: int, groups: int) -> Work:
    macs = y.numel() * weight[0].numel()
    one_by_one = groups > 1 and weight.shape[1] == 1
    return Work(0 if one_by_one else macs, macs if one_by_one else 0, 0, 0, read, written)


def _read_by(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, options) -> int:
    """Bytes of the input that some tap of a plain convolution reads; ``options``: stride, padding, dilation."""
    positions = x.shape[0] * x.shape[1]
    axes = zip(x.shape[2:], weight.shape[2:], y.shape[2:], *options, strict=True)
    for size, taps, outputs, stride, padding, dilation in axes:
        at = {i * stride - padding + t * dilation for i in range(outputs) for t in range(taps)}
        positions *= sum(0 <= i < size for i in at)
    return positions * x.element_size()


@dataclass(frozen=True)
class Row:
    """One primitive of one layer, and how often a training step of the network computes it.

    Attributes:
        least: bytes that must move.
        ours, published: what is computed, step by step; None where ACSConv cannot compute the layer.
    """

    layer: Layer
    primitive: str
    calls: int
    least: int
    ours: list[Step]
    published: list[Step] | None

    @cached_property
    def work(self) -> Work:
        return sum((step.work for step in self.ours), Work())

    @property
    def padded(self) -> int:
        return self.work.matrix + self.work.scalar

    @property
    def ideal(self) -> list[Step]:
        """Our steps, counted with as much favour as ACSConv's."""
        return [step.ideal(self.layer.multiply_adds / self.padded) for step in self.ours]

    def floor(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """Seconds of the useful multiply-adds at the matrix rate, or of the least bytes from DRAM: the longer."""
        return max(gpu.times(Work(matrix=self.layer.multiply_adds, read=self.least), 1.0, dtype))


def moved(steps: Iterable[Step]) -> int:
    """Bytes of memory."""
    return sum(step.work.read + step.work.written for step in steps)


def bound(steps: Iterable[Step], gpu: Gpu, dtype: torch.dtype) -> tuple[float, str]:
    """Seconds of steps one after the other, and what takes most of them."""
    by = dict.fromkeys(BOTTLENECKS, 0.0)
    for step in steps:
        seconds, name = step.bound(gpu, dtype)
        by[name] += seconds
    return sum(by.values()), max(by, key=by.get)


def rows(calls: dict[tuple[Layer, str], int], dtype: torch.dtype) -> list[Row]:
    """Rows of a network's calls, in their order. Triton's active driver decides the tiles."""
    found: dict[Layer, list[str]] = {}
    for layer, primitive in calls:
        found.setdefault(layer, []).append(primitive)
    where = device.current().torch_device
    return [
        Row(
            layer,
            primitive,
            calls[layer, primitive],
            layer.least_bytes(primitive, dtype),
            [step for event in layers.ours(layer, primitive, dtype, where) for _, step in steps_of(event)],
            published[primitive] if published else None,
        )
        for layer, primitives in found.items()
        for published in [_published(layer, primitives, dtype)]
        for primitive in sorted(primitives, key=PRIMITIVES.index)
    ]


def _published(layer: Layer, primitives: Sequence[str], dtype: torch.dtype) -> dict[str, list[Step]] | None:
    """ACSConv's steps, by the primitive that they are part of; None where it cannot compute the layer."""
    forward, backward = ([one for one in primitives if (one == "conv") == first] for first in (True, False))
    steps: dict[str, list[Step]] = {primitive: [] for primitive in primitives}
    try:
        for passes in (forward, backward):
            for event in layers.published(layer, passes, dtype) if passes else ():
                # What has the weight's axes or is summed for the bias belongs to the weight gradient.
                of_weights = event.name == "sum" or all(tensor.dim() == 4 for tensor in event.results)
                rest = passes[-1 if of_weights else 0]
                for part, step in steps_of(event):
                    steps[part or rest].append(step)
    except NotImplementedError:
        return None
    return steps


@contextmanager
def counting(gpu: Gpu) -> Iterator[None]:
    """Make the launchers choose for a GPU, on tensors that lie on the CPU."""
    previous = driver._active  # reading `driver.active` would look for a real GPU
    driver.set_active(CountingDriver(gpu.arch))
    try:
        yield
    finally:
        driver._active = previous
