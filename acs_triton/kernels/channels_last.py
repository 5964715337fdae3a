"""The memory format that the matrix kernels read: channels-last rows, aligned to 16 bytes.

The rule: a tensor whose channels are contiguous and whose other strides and address are multiples
of 16 bytes is read where it lies (slices included, unless 32 bits do not count the vectors that they
span). Any other is converted once (:mod:`acs_triton.kernels.layout_conversion`). A
direct gather of 16-bit values from a contiguous ``(N, C, D, H, W)`` tensor would load two bytes at
a time and could not be pipelined; the conversion reads and writes each value once, a ``k x k`` kernel
reads it ``k * k`` times.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VECTOR_BYTES = 16


def unit(dtype: torch.dtype) -> int:
    """Elements in a 16-byte vector: the grain of every offset in the matrix kernels."""
    return VECTOR_BYTES // dtype.itemsize


def strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides with those of axes of size one, which mean nothing, set to zero."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_channels_last(tensor: torch.Tensor, groups: int = 1) -> bool:
    """Whether a tensor is read where it lies; ``groups`` as in :func:`channels_last`."""
    vector = unit(tensor.dtype)
    batch, _, *spatial = strides(tensor)
    aligned = not any(stride % vector for stride in (batch, *spatial)) and tensor.data_ptr() % VECTOR_BYTES == 0
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    near = span < max(2**31 * vector, tensor.numel())
    return aligned and near and tensor.shape[1] // groups % vector == 0 and tensor.stride(1) == 1


def conversion_bytes(tensor: torch.Tensor, groups: int = 1) -> int:
    """Bytes of memory that :func:`channels_last` moves: none where the tensor is read where it lies."""
    if is_channels_last(tensor, groups):
        return 0
    channels = tensor.shape[1] // groups
    written = tensor.numel() // max(channels, 1) * (channels + -channels % unit(tensor.dtype))
    return (tensor.numel() + written) * tensor.dtype.itemsize


_shared = threading.local()


@contextmanager
def converted_once() -> Iterator[None]:
    """What is converted in this context is kept until its end, for whoever asks for it again on this thread."""
    before, _shared.kept = getattr(_shared, "kept", None), {}
    try:
        yield
    finally:
        _shared.kept = before


def channels_last(tensor: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """``(N, C, D, H, W)`` in the format above, with each group's channels padded to whole vectors by zeros."""
    if is_channels_last(tensor, groups):
        return tensor
    from .layout_conversion import convert

    kept = getattr(_shared, "kept", None)
    if kept is None:
        return convert(tensor, groups)
    key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), groups
    if key not in kept:
        kept[key] = tensor, convert(tensor, groups)  # the tensor too, so that its address stays its own
    return kept[key][1]
