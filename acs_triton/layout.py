"""Memory formats: which one a result takes."""

from __future__ import annotations

import torch

_CHANNELS = 8  # written at a time, fewer than a cache has ways
_MANY_POSITIONS = 4096
_MATRIX = 64  # rows and columns that PyTorch copies by blocks


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """``channels_last_3d`` if a 5-D tensor's strides are in that order, else contiguous.

    Slices of a channels-last tensor count as channels-last, with steps too; a single-channel tensor counts as
    it was made (but for steps PyTorch's own rule for convolutions, ``suggest_memory_format``).
    """
    order = (1, 4, 3, 2, 0)
    size, stride = tensor.shape, tensor.stride()
    if stride[1] == 0:
        return torch.contiguous_format
    least = 0
    for dim in order:
        if size[dim] == 0 or stride[dim] < least or (dim == 0 and least == stride[1]):
            return torch.contiguous_format
        # With steps, what follows the last element may lie within the next row.
        least = least + stride[dim] * (size[dim] - 1) if dim > 1 and size[dim] > 1 else stride[dim] * size[dim]
    return torch.channels_last_3d


def one_channel_last(tensor: torch.Tensor) -> torch.Tensor:
    """A view of ``(N, 1, D, H, W)`` whose strides count as channels-last."""
    return tensor.squeeze(1).unsqueeze(-1).movedim(-1, 1)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """``(N, C, D, H, W)`` so that it counts as channels-last, and with it what a network makes of it."""
    if tensor.shape[1] == 1:
        return one_channel_last(tensor)
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def empty(like: torch.Tensor, size, format: torch.memory_format) -> torch.Tensor:
    """An uninitialised tensor of another one's dtype and device."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format)


def converted(tensor: torch.Tensor, format: torch.memory_format) -> torch.Tensor:
    """``tensor.contiguous(memory_format=format)`` of ``(N, C, D, H, W)``, up to four times faster on CPUs."""
    last = format == torch.channels_last_3d
    other = torch.contiguous_format if last else torch.channels_last_3d
    known = tensor.is_contiguous(memory_format=other) and not tensor.is_contiguous(memory_format=format)
    if not known or tensor.device.type != "cpu":
        return tensor.contiguous(memory_format=format)
    result = torch.empty_like(tensor, memory_format=format)
    channels, positions = tensor.shape[1], tensor.stride(1) if last else 0
    if positions < _MANY_POSITIONS and channels >= (_MATRIX if last else 4 * _MATRIX):
        # The transposition of a matrix, which PyTorch copies by blocks.
        for target, source in zip(result, tensor, strict=True):
            rows, planes = (target, source) if last else (source, target)
            rows, planes = rows.movedim(0, -1).flatten(0, 2), planes.flatten(1)
            (rows if last else planes).copy_((planes if last else rows).t())
    else:
        write(result, tensor)
    return result


def write(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` of ``(N, C, ...)``, faster where a CPU writes channels-last what is not.

    PyTorch reads all channels of a position before the next one's, whose memory may lie a power of two apart:
    more of them than a cache has ways push each other out.
    """
    if target.stride(1) != 1 or source.stride(1) < _MANY_POSITIONS or target.device.type != "cpu":
        target.copy_(source)
        return
    for some, of in zip(target.split(_CHANNELS, 1), source.split(_CHANNELS, 1), strict=True):
        some.copy_(of)
