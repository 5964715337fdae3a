"""The primitives in the library's Triton kernels, and the rule of what they do not compute.

This module imports where Triton is not installed; :func:`why_not` then says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from ..activations import activate_
from ..geometry import Geometry
from ..kernels import channels_last, device, gather_tables
from ..layout import memory_format
from . import exact, mixed

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
    data, other, geometry = _operands(primitive, data, other, geometry)
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
    if primitive != "weight_grad" and other.numel() >= 2**31:
        return f"a weight of shape {tuple(other.shape)} is beyond the 32-bit offsets of the kernel that packs it"
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
        # Where exactness is asked for: the copy engine's zeros beyond the output meet what the input has there.
        suited = not torch.is_anomaly_enabled() and descriptor_weight_grad.suits(data, other, geometry)
        return descriptor_weight_grad if suited else weight_grad
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


@lru_cache(maxsize=1024)
def _at_stride_one(geometry: Geometry) -> Geometry | None:
    """Of the positions that a 1x1 convolution reads at a stride, beginning with the first; None for any other."""
    if geometry.kernel_size != (1, 1) or geometry.stride == (1, 1, 1) or any(map(any, geometry.start)):
        return None
    return replace(geometry, stride=(1, 1, 1), input_size=geometry.output_size)


def _picked(input: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """A 1x1 convolution at a stride is one at stride 1 of a view of its input.

    The copy engine fetches the view's boxes as any other's, and a conversion moves nothing else.
    """
    picked = _at_stride_one(geometry)
    if picked is None:
        return input, geometry
    d, h, w = geometry.stride
    view = input[:, :, ::d, ::h, ::w]
    # The result has the format of the input, which a view of few positions may not show.
    if view.shape[2:] != picked.input_size or memory_format(view) != memory_format(input):
        return input, geometry
    return view, picked


def _operands(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Geometry]:
    """A primitive's first two tensors, of which the input is as the kernels get it (:func:`_picked`)."""
    if primitive == "conv":
        data, geometry = _picked(data, geometry)
    elif primitive == "weight_grad":
        other, geometry = _picked(other, geometry)
    return data, other, geometry


@dataclass(frozen=True)
class Plan:
    """Which kernel computes a call.

    Attributes:
        kernel: module of :mod:`acs_triton.kernels`.
        tile: the matrix kernels' tile; None for others, which choose theirs when launched.
        copies: tensors that are converted into the kernels' memory format first.
        view_by_view: whether the kernel computes mixed views one after the other.
        copied_bytes: that the conversions read and write.
        part_by_part: whether the kernel computes views and groups one after the other (:mod:`.exact`).
    """

    kernel: str
    tile: object | None
    copies: tuple[str, ...]
    view_by_view: bool = False
    copied_bytes: int = 0
    part_by_part: bool = False

    def __str__(self) -> str:
        text = self.kernel if self.tile is None else f"{self.kernel}, {self.tile}"
        text = f"{text}, view by view" if self.view_by_view else text
        text = f"{text}, part by part (anomaly detection is on)" if self.part_by_part else text
        if not self.copies:
            return text
        moved = f"which moves {self.copied_bytes / 1e6:.1f} MB"
        return f"{text}; converts {' and '.join(self.copies)} to channels-last first, {moved}"


def plan(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> Plan:
    """How a call is computed that :func:`why_not` does not object to; arguments as there."""
    in_channels, out_channels = _channels(primitive, data, other, geometry)
    data, other, geometry = _operands(primitive, data, other, geometry)
    if parts := exact.parts(geometry, in_channels, out_channels):
        first = plan(primitive, *parts[0].operands(primitive, data, other), parts[0].geometry)
        return replace(first, part_by_part=True)
    if _view_by_view(primitive, data, other, geometry, in_channels, out_channels):
        return replace(plan(primitive, data, other, geometry.one_view(0, out_channels)), view_by_view=True)
    family = _family(primitive, data, other, geometry, in_channels, out_channels)
    kernel = _kernel(primitive, data, other, geometry, in_channels, out_channels)
    if kernel not in MATRIX_KERNELS:
        return Plan(kernel, None, ())
    read = {"conv": ["input"], "input_grad": ["grad_output"], "weight_grad": ["grad_output", "input"]}[primitive]
    groups = geometry.groups if primitive == "conv" else 1
    moved = {
        name: channels_last.conversion_bytes(tensor, groups)
        for name, tensor in zip(read, (data, other), strict=False)
        if not channels_last.is_channels_last(tensor, groups)
    }
    tile = getattr(family, f"{primitive}_tile")(in_channels, out_channels, data.dtype, geometry)
    return Plan(kernel, tile, tuple(moved), copied_bytes=sum(moved.values()))


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``(N, C, D, H, W)`` to ``(N, O, *geometry.output_size)``."""
    return conv_act(input, weight, bias, "", geometry)


def conv_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, geometry: Geometry) -> Tensor:
    """An activation of :func:`conv`, before the result is rounded and stored."""
    bias = None if bias is None else bias.contiguous()  # the kernels read it by its address alone
    channels = _channels("conv", input, weight, geometry)
    input, geometry = _picked(input, geometry)
    if parts := exact.parts(geometry, *channels):
        return exact.conv(lambda *of: conv_act(*of[:-1], activation, of[-1]), parts, input, weight, bias)
    if _view_by_view("conv", input, weight, geometry, *channels):
        output = mixed.conv(conv, mixed.views(geometry, weight.shape[0]), input, weight, bias, geometry)
        return activate_(output, activation) if activation else output
    return _family("conv", input, weight, geometry, *channels).conv(input, weight, bias, geometry, activation)


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` to ``(N, C, *geometry.input_size)``."""
    channels = _channels("input_grad", grad_output, weight, geometry)
    if parts := exact.parts(geometry, *channels):
        return exact.input_grad(input_grad, parts, grad_output, weight)
    if _view_by_view("input_grad", grad_output, weight, geometry, *channels):
        planes = mixed.views(geometry, weight.shape[0])
        return mixed.input_grad(input_grad, planes, grad_output, weight, geometry)
    return _family("input_grad", grad_output, weight, geometry, *channels).input_grad(grad_output, weight, geometry)


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(N, C, *geometry.input_size)`` to ``(O, C/groups, ku, kv)``."""
    channels = _channels("weight_grad", grad_output, input, geometry)
    input, geometry = _picked(input, geometry)
    if parts := exact.parts(geometry, *channels):
        return exact.weight_grad(weight_grad, parts, grad_output, input)
    if _view_by_view("weight_grad", grad_output, input, geometry, *channels):
        planes = mixed.views(geometry, grad_output.shape[1])
        return mixed.weight_grad(weight_grad, planes, grad_output, input, geometry)
    return _family("weight_grad", grad_output, input, geometry, *channels).weight_grad(grad_output, input, geometry)


def gradients(grad_output: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """:func:`input_grad` and :func:`weight_grad`, for which the output's gradient is converted once."""
    with channels_last.converted_once():
        return input_grad(grad_output, weight, geometry), weight_grad(grad_output, input, geometry)
