"""The primitives in the library's Triton kernels, and the rule of what they do not compute.

This module imports where Triton is not installed; :func:`why_not` then says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..activations import activate_
from ..geometry import Geometry
from ..kernels import channels_last, device, gather_tables
from . import mixed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of the kernels; the interpreter adds float64."""

MATRIX_KERNELS = ("gather_gemm", "descriptor_gemm", "weight_grad", "descriptor_weight_grad")


def why_not_device(tensor: Tensor) -> str | None:
    """One sentence on why Triton cannot launch on a tensor's device, or None if it can."""
    with device.of(tensor):  # several GPUs need not be alike
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
    if _view_by_view(primitive, data, other, geometry, in_channels, out_channels):
        reasons = (why_not(primitive, data, other, geometry.one_view(view, out_channels)) for view in range(3))
        return next(filter(None, reasons), None)
    kernel = _kernel(primitive, data, other, geometry, in_channels, out_channels)
    if kernel not in MATRIX_KERNELS:
        return None
    if kernel == "gather_gemm":
        if primitive == "input_grad" and max(geometry.stride) > 1:
            # How far the positions of one tile's 128 rows, all of one parity class, are apart at most.
            plane = geometry.stride[0] * geometry.input_size[1] * geometry.input_size[2]
            if (512 * math.prod(geometry.stride) + 2 * plane) * in_channels >= 2**31:
                return f"stride={geometry.stride} spreads {in_channels} channels beyond the kernel's 32-bit offsets"
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


def _family(
    primitive: str, data: Tensor, other: Tensor, geometry: Geometry, in_channels: int, out_channels: int
) -> ModuleType:
    """The module that computes a primitive."""
    from ..kernels import depthwise, descriptor_gemm, descriptor_weight_grad, gather_gemm, stem, weight_grad

    if depthwise.suits(geometry, in_channels, out_channels):
        return depthwise
    if stem.suits(geometry, in_channels, out_channels) and hasattr(stem, primitive):
        return stem
    if primitive == "weight_grad":
        return descriptor_weight_grad if descriptor_weight_grad.suits(data, other, geometry) else weight_grad
    suited = descriptor_gemm.suits(primitive, data, geometry, in_channels, out_channels)
    return descriptor_gemm if suited else gather_gemm


def _kernel(
    primitive: str, data: Tensor, other: Tensor, geometry: Geometry, in_channels: int, out_channels: int
) -> str:
    return _family(primitive, data, other, geometry, in_channels, out_channels).__name__.rpartition(".")[2]


def _view_by_view(
    primitive: str, data: Tensor, other: Tensor, geometry: Geometry, in_channels: int, out_channels: int
) -> bool:
    """The rule of which mixed views are computed one after the other: those that no kernel takes at once.

    The matrix kernels take the merged taps of all views, on one grid or not, as long as they can tell them apart.
    """
    if not geometry.mixed:
        return False
    kernel = _kernel(primitive, data, other, geometry, in_channels, out_channels)
    if kernel not in MATRIX_KERNELS:
        return True
    transposed = primitive == "input_grad"
    return kernel == "gather_gemm" and gather_tables.tap_bits(geometry, transposed) > gather_tables.TAP_BITS


@dataclass(frozen=True)
class Plan:
    """Which kernel computes a call.

    Attributes:
        kernel: module of :mod:`acs_triton.kernels`.
        tile: the matrix kernels' tile; None for others, which choose theirs when launched.
        copies: tensors that are copied into the kernels' memory format first.
        view_by_view: whether the kernel computes mixed views one after the other.
    """

    kernel: str
    tile: object | None
    copies: tuple[str, ...]
    view_by_view: bool = False

    def __str__(self) -> str:
        text = self.kernel if self.tile is None else f"{self.kernel}, {self.tile}"
        text = f"{text}, view by view" if self.view_by_view else text
        return f"{text}; copies {' and '.join(self.copies)} to channels-last" if self.copies else text


def plan(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> Plan:
    """How a call is computed that :func:`why_not` does not object to; arguments as there."""
    in_channels, out_channels = _channels(primitive, data, other, geometry)
    if _view_by_view(primitive, data, other, geometry, in_channels, out_channels):
        return replace(plan(primitive, data, other, geometry.one_view(0, out_channels)), view_by_view=True)
    family = _family(primitive, data, other, geometry, in_channels, out_channels)
    kernel = _kernel(primitive, data, other, geometry, in_channels, out_channels)
    if kernel not in MATRIX_KERNELS:
        return Plan(kernel, None, ())
    read = {"conv": ["input"], "input_grad": ["grad_output"], "weight_grad": ["grad_output", "input"]}[primitive]
    groups = geometry.groups if primitive == "conv" else 1
    copies = tuple(
        name
        for name, tensor in zip(read, (data, other), strict=False)
        if not channels_last.is_channels_last(tensor, groups)
    )
    sizes = (in_channels, out_channels) if kernel == "weight_grad" else (data.shape[0], in_channels, out_channels)
    tile = getattr(family, f"{primitive}_tile")(*sizes, data.dtype, geometry)
    return Plan(kernel, tile, copies)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``(N, C, D, H, W)`` to ``(N, O, *geometry.output_size)``."""
    return conv_act(input, weight, bias, "", geometry)


def conv_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, geometry: Geometry) -> Tensor:
    """An activation of :func:`conv`, before the result is rounded and stored."""
    bias = None if bias is None else bias.contiguous()  # the kernels read it by its address alone
    channels = _channels("conv", input, weight, geometry)
    if _view_by_view("conv", input, weight, geometry, *channels):
        output = mixed.conv(conv, mixed.views(geometry, weight.shape[0]), input, weight, bias, geometry)
        return activate_(output, activation) if activation else output
    return _family("conv", input, weight, geometry, *channels).conv(input, weight, bias, geometry, activation)


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` to ``(N, C, *geometry.input_size)``."""
    channels = _channels("input_grad", grad_output, weight, geometry)
    if _view_by_view("input_grad", grad_output, weight, geometry, *channels):
        planes = mixed.views(geometry, weight.shape[0])
        return mixed.input_grad(input_grad, planes, grad_output, weight, geometry)
    return _family("input_grad", grad_output, weight, geometry, *channels).input_grad(grad_output, weight, geometry)


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(N, C, *geometry.input_size)`` to ``(O, C/groups, ku, kv)``."""
    channels = _channels("weight_grad", grad_output, input, geometry)
    if _view_by_view("weight_grad", grad_output, input, geometry, *channels):
        planes = mixed.views(geometry, grad_output.shape[1])
        return mixed.weight_grad(weight_grad, planes, grad_output, input, geometry)
    return _family("weight_grad", grad_output, input, geometry, *channels).weight_grad(grad_output, input, geometry)
