"""Layers so small that a call takes longer than its arithmetic: what depends on shapes alone is found once.

Every piece is one plain convolution of the whole input as it lies. Nothing is gained by another form, so none is
looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..geometry import Geometry
from . import onednn
from .pieces import pieces_of

_MOST = onednn.WORTHWHILE // 8
"""Multiply-adds of a layer, a few microseconds of PyTorch's own convolution."""


@dataclass(frozen=True)
class Convolution:
    """That of a piece.

    Attributes:
        size, steps, offset: its kernel ``(channels, C/groups, kd, kh, kw)`` in a contiguous weight.
        stride, padding, dilation, groups: of the convolution.
    """

    size: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def kernel(self, weight: Tensor) -> Tensor:
        return weight.as_strided(self.size, self.steps, weight.storage_offset() + self.offset)


@dataclass(frozen=True)
class Plan:
    """The pieces, and the number of output channels of each."""

    pieces: tuple[Convolution, ...]
    channels: tuple[int, ...]


@lru_cache(maxsize=4096)
def plan(geometry: Geometry, input_shape: tuple[int, ...], weight_shape: tuple[int, ...], on_cpu: bool) -> Plan | None:
    """How a layer of these shapes is computed, or None if it is not small or some piece needs more than that."""
    out_channels, group_channels, *kernel = weight_shape
    pieces = pieces_of(geometry, out_channels, on_cpu)
    for piece in pieces:
        fits = piece.fit.exact and piece.weight_fit == piece.fit and not piece.fit.outside
        if not fits or piece.groups != geometry.groups:
            return None
    work = input_shape[0] * prod(geometry.output_size) * prod(weight_shape)
    if work > _MOST or 0 in input_shape:
        return None
    rows, convolutions = group_channels * prod(kernel), []
    for piece in pieces:
        size, steps = [piece.channels, group_channels, *kernel], [rows, prod(kernel), kernel[1], 1]
        size.insert(piece.view + 2, 1)
        steps.insert(piece.view + 2, 1)
        how = geometry.stride, piece.fit.padding, piece.dilation, piece.groups
        convolutions.append(Convolution(tuple(size), tuple(steps), piece.first * rows, *how))
    return Plan(tuple(convolutions), tuple(piece.channels for piece in pieces))


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """The convolution; ``weight`` is contiguous."""
    biases = [None] * len(plan.pieces) if bias is None else bias.split_with_sizes(plan.channels)
    parts = [
        torch.conv3d(input, one.kernel(weight), of, one.stride, one.padding, one.dilation, one.groups)
        for one, of in zip(plan.pieces, biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def gradients(grad_output: Tensor, input: Tensor, weight: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Those of the input and the weight, which is contiguous."""
    for_input, for_kernels, none = None, [], (0, 0, 0)
    for one, grad in zip(plan.pieces, grad_output.split_with_sizes(plan.channels, 1), strict=True):
        how = one.stride, one.padding, one.dilation, False, none, one.groups, (True, True, False)
        part, for_kernel, _ = torch.ops.aten.convolution_backward(grad, input, one.kernel(weight), None, *how)
        for_input = part if for_input is None else for_input.add_(part)
        for_kernels.append(for_kernel.reshape(-1, *weight.shape[1:]))
    for_weight = for_kernels[0] if len(for_kernels) == 1 else torch.cat(for_kernels)
    return for_input, for_weight.contiguous()  # in memory as the weight, whatever the input's format
