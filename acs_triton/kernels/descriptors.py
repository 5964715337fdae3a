"""What the copy engine (TMA) of compute capability 9.0 and newer is told of tensors: shapes, strides, boxes.

Its axes count positions one by one. Of a convolution at a stride it is told a view in which that is so: positions
that are a stride apart form a class, and the first axis tells apart the classes of all samples
(:class:`acs_triton.kernels.descriptor_tables.Classes`). All axes' ends are then those of the volume, since
strides divide its sizes: what lies outside still reads as zero.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..geometry import Geometry, Triple
from . import device
from .channels_last import is_channels_last, strides, unit
from .descriptor_tables import Classes, has_classes

MINIMUM_CAPABILITY = 90


def available() -> bool:
    """Whether the device that Triton drives has a copy engine."""
    facts = device.current()
    return facts.backend == "cuda" and facts.arch >= MINIMUM_CAPABILITY


def repeats(tensor: Tensor, groups: int = 1) -> bool:
    """Whether a tensor would be read where it lies through a stride of zero; the copy engine does not promise that."""
    repeated = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return repeated and is_channels_last(tensor, groups)


def readable(input: Tensor, geometry: Geometry, groups: int = 1) -> bool:
    """Whether boxes of a convolution's input can be fetched: not repeated, at stride 1 or in classes."""
    if repeats(input, groups):
        return False
    return max(geometry.stride) == 1 or (has_classes(geometry) and input.shape[0] * math.prod(input.shape[2:]) < 2**31)


def in_classes(tensor: Tensor, stride: Triple) -> tuple[Tensor, Classes | None]:
    """``(N, C, D, H, W)`` in channels-last memory as ``(classes of all samples, C, D/stride, H/stride, W/stride)``.

    At stride 1 that is the tensor, without classes.
    """
    if max(stride) == 1:
        return tensor, None
    batch, channels, *size = tensor.shape
    sample, *_ = strides(tensor)
    steps = tensor.stride()[2:]
    apart = [step if s > 1 else 0 for step, s in zip(steps, stride, strict=True)]
    grain = math.gcd(sample, *apart)
    classes = Classes(stride, sample // grain, tuple(step // grain for step in apart))
    last = (batch - 1) * classes.sample + sum((s - 1) * p for s, p in zip(stride, classes.pitch, strict=True))
    shape = [n // s for n, s in zip(size, stride, strict=True)]
    view = tensor.as_strided(
        (last + 1, channels, *shape), (grain, 1, *(step * s for step, s in zip(steps, stride, strict=True)))
    )
    return view, classes


@lru_cache(maxsize=4096)
def _checked(dtype: torch.dtype, shape: tuple[int, ...], steps: tuple[int, ...], box: tuple[int, ...]):
    """A descriptor's attributes without its tensor: Triton's checks of them take as long as some launches."""
    return vars(TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), list(steps), list(box))) | {"base": None}


def describe(tensor: Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """Of a tensor whose address and strides are multiples of 16 bytes, but for the last, which is 1."""
    result = object.__new__(TensorDescriptor)
    result.__dict__ = {**_checked(tensor.dtype, tuple(tensor.shape), tensor.stride(), box), "base": tensor}
    return result


def descriptor(tensor: Tensor, order: Triple, box: Triple, channels: int) -> TensorDescriptor:
    """Of ``(N, C, D, H, W)`` in channels-last memory: ``(N, axes in order, C)`` in boxes ``(1, *box, channels)``."""
    i, j, k = order
    tensor = tensor.permute(0, i + 2, j + 2, k + 2, 1)
    if 1 in tensor.shape:
        # The stride of an axis of size one is never used, but must be one that an axis could have.
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        steps = [stride if size > 1 else unit(tensor.dtype) for size, stride in sizes]
        tensor = tensor.as_strided(tensor.shape, (*steps[:4], 1))
    return describe(tensor, (1, *box, channels))
