"""ACS convolutions in PyTorch's own operators, for exporters and other tools that see operators one by one.

Each view is one ``conv3d`` whose kernel has extent 1 on the through-plane axis. No size is fixed:
traced with dynamic sizes, the graph holds for all of them.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import ConvParams

_state = threading.local()


class standard_operators:
    """In this block convolutions are computed by operators of PyTorch alone: ``conv3d``, padding, ``cat``.

    For ``torch.export`` towards a runtime that does not know this library's operators.
    ``torch.onnx.export`` needs no such block: it gets the same operators by itself.

    >>> import torch, acs_triton
    >>> model = acs_triton.convert(torch.nn.Conv2d(1, 6, 3, padding=1))
    >>> with acs_triton.standard_operators():
    ...     exported = torch.export.export(model, (torch.zeros(1, 1, 4, 5, 6),))
    >>> sum(node.target == torch.ops.aten.conv3d.default for node in exported.graph.nodes)
    3
    """

    def __enter__(self) -> standard_operators:
        _state.blocks = getattr(_state, "blocks", 0) + 1
        return self

    def __exit__(self, *_) -> None:
        _state.blocks -= 1


def wanted() -> bool:
    """Whether convolutions are to be computed here: in the block above, or for ONNX."""
    if getattr(_state, "blocks", 0) > 0:
        return True
    # Asked only where something is exported: the question takes longer than a small layer's checks.
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, params: ConvParams) -> Tensor:
    """The convolution of checked operands: ``(N, C, D, H, W)`` to ``(N, O, D', H', W')``."""
    size, out_channels = input.shape[2:], weight.shape[0]
    out_size = params.output_size(size)
    first, pieces = 0, []
    for view, count in enumerate(params.split):
        if count:
            pieces.append((view, first, first + count, params.plain_conv(view, size)))
        first += count
    if params.kernel_size == (1, 1) and not any(params.offset_varies(view) for view, *_ in pieces):
        view, _, _, axes = pieces[0]
        if all(other == axes for *_, other in pieces):
            pieces = [(view, 0, out_channels, axes)]
    parts = [_view(input, weight, bias, params, out_size, *piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _view(input, weight, bias, params: ConvParams, out_size, view: int, first: int, end: int, axes) -> Tensor:
    """Output channels ``first`` to ``end``, all of one view."""
    input, weight, bias, groups, kept = _groups(input, weight, bias, params.groups, first, end)
    stride = list(params.stride)
    lows, highs, dilation = zip(*axes, strict=True)
    if params.offset_varies(view) and not isinstance(input.shape[view + 2], int):
        input = _sampled(input, params, view, lows[view], highs[view], out_size[view])
        lows, highs = (tuple(0 if a == view else n for a, n in enumerate(sides)) for sides in (lows, highs))
        stride[view] = 1
    output = conv3d(input, weight.unsqueeze(view + 2), bias, stride, (lows, highs), dilation, groups)
    return output if kept is None else output.narrow(1, *kept)


def conv3d(input, weight, bias, stride, pads, dilation, groups: int) -> Tensor:
    """``torch.nn.functional.conv3d`` of an input padded by ``pads = (low, high)``, per axis, a crop where negative.

    PyTorch itself pads the axes where both sides are the same and it can be trusted to.
    """
    spanned = spanned_axes(weight, input.shape[2:], dilation)
    padding = tuple(0 if low != high or low < 0 or out else low for low, high, out in zip(*pads, spanned, strict=True))
    rest = [side[axis] - padding[axis] for axis in (2, 1, 0) for side in pads]
    for part in ([max(n, 0) for n in rest], [min(n, 0) for n in rest]):  # at once, a crop could exceed the input
        input = F.pad(input, part) if any(part) else input
    return F.conv3d(input, weight, bias, stride, padding, dilation, groups)


def spanned_axes(weight: Tensor, size, dilation) -> tuple[bool, ...]:
    """The axes of ``size`` that a kernel spans, where PyTorch's weight gradient needs another way to pad.

    On CPUs that of PyTorch 2.14 (oneDNN) is wrong, or writes where it must not, for float32 and
    bfloat16 along an axis that the convolution pads itself and that is no longer than the kernel.
    A transposed convolution has its output there.
    """
    if weight.device.type != "cpu" or not (weight.requires_grad and torch.is_grad_enabled()):
        return (False,) * len(dilation)
    return tuple((k - 1) * d + 1 >= n for k, d, n in zip(weight.shape[2:], dilation, size, strict=True))


def _sampled(input: Tensor, params: ConvParams, view: int, low: int, high: int, out) -> Tensor:
    """The through-plane samples of a view whose offset depends on a size that is not known.

    ``low`` and ``high`` are the padding where ACSConv crops. The condition is that of
    :func:`acs_triton.geometry.through_offset`, in tensors.
    """
    (carried, other), stride = (sides[view] for sides in params.carried), params.stride[view]
    size = torch.scalar_tensor(input.shape[view + 2] - carried - other, dtype=torch.int64)
    count = torch.scalar_tensor(out, dtype=torch.int64)
    uncropped = ((count == size) | (2 * count == size)) & ((size - 1) // stride + 1 == count)
    pads = [0] * 6
    pads[4 - 2 * view], pads[5 - 2 * view] = before, _ = max(low, 0), max(high, high + low + carried, 0)
    first = torch.where(uncropped, carried, -low) + before
    index = torch.arange(out, device=input.device) * stride + first.to(input.device)
    return F.pad(input, pads).index_select(view + 2, index)


def _groups(input, weight, bias, groups: int, first: int, end: int):
    """What output channels ``first`` to ``end`` need: whole groups, or part of one, and what to keep of the result."""
    out_channels, group_channels = weight.shape[:2]
    each = out_channels // groups
    low, high = first // each, -(-end // each)
    channels = (first, end) if high - low == 1 else (low * each, high * each)
    if high - low < groups:
        input = input.narrow(1, low * group_channels, (high - low) * group_channels)
    if channels != (0, out_channels):
        weight = weight[channels[0] : channels[1]]
        bias = None if bias is None else bias[channels[0] : channels[1]]
    kept = None if channels == (first, end) else (first - channels[0], end - first)
    return input, weight, bias, high - low, kept
