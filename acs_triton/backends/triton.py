"""The primitives in the library's Triton kernels, and the rule of what they do not compute.

This module imports where Triton is not installed; :func:`why_not` then says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels import channels_last, device, gather_tables

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of the kernels; the interpreter adds float64."""


def why_not_device(tensor: Tensor) -> str | None:
    """One sentence on why Triton cannot launch on a tensor's device, or None if it can."""
    reason = device.why_not()
    if reason is None and tensor.device.type != device.current().torch_device.type:
        reason = f"the tensor is on {tensor.device}, Triton drives {device.current().torch_device}"
    return reason


def why_not(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> str | None:
    """The rule of what goes to the torch backend: one sentence on why, or None if the kernels compute it.

    Args:
        primitive: ``"conv"``, ``"input_grad"`` or ``"weight_grad"``.
        data, other: its first two tensors.
    """
    reason = why_not_device(data)
    if reason is not None:
        return reason
    dtypes = (*DTYPES, torch.float64) if device.INTERPRETED else DTYPES
    if data.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the kernels compute {names}, not {str(data.dtype).removeprefix('torch.')}"
    in_channels, out_channels = _channels(primitive, data, other, geometry)
    family = _family(primitive, geometry, in_channels, out_channels)
    if family.__name__.rpartition(".")[2] not in ("gather_gemm", "weight_grad"):
        return None
    if primitive != "weight_grad":
        bits = gather_tables.tap_bits(geometry, primitive == "input_grad")
        if bits > gather_tables.TAP_BITS:
            return (
                f"kernel_size={geometry.kernel_size} reaches outside the tensor at {bits} tap positions, "
                f"the kernel tells {gather_tables.TAP_BITS} apart"
            )
    vector = channels_last.unit(data.dtype)
    positions = max(math.prod(geometry.input_size), math.prod(geometry.output_size))
    batch = data.shape[0] if primitive == "weight_grad" else 1
    if positions >= 2**30 or batch * positions * (max(in_channels, out_channels) // vector + geometry.groups) >= 2**31:
        return f"input size {geometry.input_size} with these channels is beyond the kernels' 32-bit vector offsets"
    return None


def _channels(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Input and output channels."""
    if primitive == "conv":
        return data.shape[1], other.shape[0]
    return (other.shape[1] * geometry.groups if primitive == "input_grad" else other.shape[1]), data.shape[1]


def _family(primitive: str, geometry: Geometry, in_channels: int, out_channels: int) -> ModuleType:
    """The module that computes a primitive."""
    from ..kernels import depthwise, gather_gemm, stem, weight_grad

    if depthwise.suits(geometry, in_channels, out_channels):
        return depthwise
    if stem.suits(geometry, in_channels, out_channels) and hasattr(stem, primitive):
        return stem
    return weight_grad if primitive == "weight_grad" else gather_gemm


@dataclass(frozen=True)
class Plan:
    """Which kernel computes a call.

    Attributes:
        kernel: module of :mod:`acs_triton.kernels`.
        tile: the matrix kernels' tile; None for others, which choose theirs when launched.
        copies: tensors that are copied into the kernels' memory format first.
    """

    kernel: str
    tile: object | None
    copies: tuple[str, ...]

    def __str__(self) -> str:
        text = self.kernel if self.tile is None else f"{self.kernel}, {self.tile}"
        return f"{text}; copies {' and '.join(self.copies)} to channels-last" if self.copies else text


def plan(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> Plan:
    """How a call is computed that :func:`why_not` does not object to; arguments as there."""
    in_channels, out_channels = _channels(primitive, data, other, geometry)
    family = _family(primitive, geometry, in_channels, out_channels)
    kernel = family.__name__.rpartition(".")[2]
    if kernel not in ("gather_gemm", "weight_grad"):
        return Plan(kernel, None, ())
    read = {"conv": ["input"], "input_grad": ["grad_output"], "weight_grad": ["grad_output", "input"]}[primitive]
    groups = geometry.groups if primitive == "conv" else 1
    copies = tuple(
        name
        for name, tensor in zip(read, (data, other), strict=False)
        if not channels_last.is_channels_last(tensor, groups)
    )
    sizes = (in_channels, out_channels) if primitive == "weight_grad" else (data.shape[0], in_channels, out_channels)
    tile = getattr(family, f"{primitive}_tile")(*sizes, data.dtype, geometry)
    return Plan(kernel, tile, copies)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``(N, C, D, H, W)`` to ``(N, O, *geometry.output_size)``."""
    bias = None if bias is None else bias.contiguous()  # the kernels read it by its address alone
    return _family("conv", geometry, input.shape[1], weight.shape[0]).conv(input, weight, bias, geometry)


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` to ``(N, C, *geometry.input_size)``."""
    channels = _channels("input_grad", grad_output, weight, geometry)
    return _family("input_grad", geometry, *channels).input_grad(grad_output, weight, geometry)


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(N, C, *geometry.input_size)`` to ``(O, C/groups, ku, kv)``."""
    channels = _channels("weight_grad", grad_output, input, geometry)
    return _family("weight_grad", geometry, *channels).weight_grad(grad_output, input, geometry)
