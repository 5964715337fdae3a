"""Memory formats: which one a result takes."""

from __future__ import annotations

import torch


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


def converted(tensor: torch.Tensor, format: torch.memory_format) -> torch.Tensor:
    """``tensor.contiguous(memory_format=format)`` of ``(N, C, D, H, W)``, several times faster on CPUs.

    Between the two formats lies the transposition of a matrix for each sample, which PyTorch copies by
    blocks; what it is given as five axes, it copies by single values.
    """
    last = format == torch.channels_last_3d
    other = torch.contiguous_format if last else torch.channels_last_3d
    if tensor.is_contiguous(memory_format=format) or not tensor.is_contiguous(memory_format=other):
        return tensor.contiguous(memory_format=format)
    result = torch.empty_like(tensor, memory_format=format)
    for target, source in zip(result, tensor, strict=True):
        rows, planes = (target, source) if last else (source, target)
        rows, planes = rows.permute(1, 2, 3, 0).flatten(0, 2), planes.flatten(1)
        (rows if last else planes).copy_((planes if last else rows).t())
    return result
