"""Layers so small that a call takes longer than its arithmetic: plain convolutions, found once, that PyTorch derives.

Every piece is one convolution of the whole input as it lies. Nothing is gained by another form, so none is looked for;
and PyTorch's own derivatives of them, of every order, run without Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter

from ..geometry import ConvParams
from ..layout import memory_format
from . import onednn
from .pieces import pieces_of

_MOST = onednn.WORTHWHILE // 8
"""Multiply-adds of a layer, a few microseconds of PyTorch's own convolution."""


@dataclass(frozen=True)
class Plan:
    """The pieces.

    Attributes:
        channels: the number of output channels of each.
        convolutions: of each the axis that its kernel lacks, and stride, padding, dilation and groups.
    """

    channels: tuple[int, ...]
    convolutions: tuple[tuple[int, tuple], ...]


_kept: dict[tuple[int, int], tuple] = {}


def plan(input: Tensor, weight: Tensor, params: ConvParams) -> Plan | None:
    """How a layer on a CPU is computed, or None if it is not small or some piece needs more than that."""
    if input.dtype not in (torch.float32, torch.float64):  # PyTorch's own gradients sum up taps in float16
        return None
    return _plan(params, input.shape, weight.shape)


@lru_cache(maxsize=4096)
def _plan(params: ConvParams, input_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> Plan | None:
    geometry = params.geometry(input_shape[2:])
    work = input_shape[0] * prod(geometry.output_size) * prod(weight_shape)
    if work > _MOST or 0 in input_shape or geometry.mixed:
        return None
    pieces, convolutions = pieces_of(geometry, weight_shape[0], True), []
    for piece in pieces:
        fits = piece.fit.exact and piece.weight_fit == piece.fit and not piece.fit.outside
        if not fits or piece.groups != geometry.groups:
            return None
        convolutions.append((piece.view + 2, (geometry.stride, piece.fit.padding, piece.dilation, piece.groups)))
    return Plan(tuple(piece.channels for piece in pieces), tuple(convolutions))


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """The differentiable convolution."""
    kernels, biases = (_cut if torch.is_grad_enabled() else _cut_once)(weight, bias, plan)
    parts = [
        torch.conv3d(input, kernel, of, *how)
        for kernel, of, (_, how) in zip(kernels, biases, plan.convolutions, strict=True)
    ]
    result = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if input.stride(1) > 1 and input.is_contiguous() and result.is_contiguous():
        return result  # plain memory, as nearly always
    return result.contiguous(memory_format=memory_format(input))


def _cut(weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Kernels and biases of the pieces."""
    kernels = weight.split_with_sizes(plan.channels)
    kernels = [kernel.unsqueeze(axis) for kernel, (axis, _) in zip(kernels, plan.convolutions, strict=True)]
    return kernels, [None] * len(kernels) if bias is None else bias.split_with_sizes(plan.channels)


def _cut_once(weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """:func:`_cut` without derivatives, of parameters once.

    What is kept are views, which see every change; they hold the memory, so no other tensor's can begin there.
    """
    if type(weight) is not Parameter or not weight.is_contiguous() or type(bias) not in (Parameter, type(None)):
        return _cut(weight, bias, plan)
    key = id(weight), id(bias)
    of = weight.data_ptr(), None if bias is None else bias.data_ptr(), plan
    found = _kept.get(key)
    if found is None:
        weakref.finalize(weight, _kept.pop, key, None).atexit = False
    elif found[0] == of:
        return found[1]
    views = _cut(weight.detach(), None if bias is None else bias.detach(), plan)
    _kept[key] = of, views
    return views
