"""The primitives in PyTorch's own convolutions (oneDNN on CPUs, cuDNN on GPUs).

Each view is one ``conv3d`` whose kernel has extent 1 on the through-plane axis. Crops are views
of the input. A padded copy is made only where samples lie outside the input in a way that the
convolution's own symmetric padding cannot say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry, Triple, conv_size
from ..layout import memory_format


@dataclass(frozen=True)
class _Fit:
    """How the axes of a tensor are padded, so that a plain convolution reads the right positions.

    ``padding`` is the convolution's own. ``low`` and ``high`` are positions to add (or, where
    negative, to cut off) before it. ``outside``: no sample lies inside the tensor.
    """

    padding: Triple
    low: Triple
    high: Triple
    outside: bool


def _fit(
    start: Triple,
    size: Triple,
    out: Triple,
    stride: Triple,
    extent: Triple,
    dilation: Triple,
    pads_small_inputs: bool = True,
) -> _Fit:
    """``pads_small_inputs``: whether the convolution may itself pad an axis that the kernel spans."""
    padding, low, high, outside = [0] * 3, [0] * 3, [0] * 3, False
    for a in range(3):
        reach = (extent[a] - 1) * dilation[a] + 1
        last = start[a] + (out[a] - 1) * stride[a] + reach - 1
        outside |= start[a] >= size[a] or last < 0
        own = start[a] <= 0 and conv_size(size[a], extent[a], stride[a], -start[a], -start[a], dilation[a]) == out[a]
        if own and (pads_small_inputs or reach < size[a]):
            padding[a] = -start[a]
        else:
            low[a], high[a] = -start[a], last + 1 - size[a]
    return _Fit(tuple(padding), tuple(low), tuple(high), outside)


def _fitted(tensor: Tensor, fit: _Fit) -> Tensor:
    for axis, (low, high) in enumerate(zip(fit.low, fit.high, strict=True)):
        if low < 0 or high < 0:
            cut = max(-low, 0)
            tensor = tensor.narrow(axis + 2, cut, tensor.shape[axis + 2] - cut - max(-high, 0))
    if max(fit.low + fit.high) > 0:
        tensor = F.pad(tensor, _pads(tuple(max(n, 0) for n in fit.low), tuple(max(n, 0) for n in fit.high)))
    return tensor


def _unfitted(gradient: Tensor, fit: _Fit) -> Tensor:
    """The gradient of :func:`_fitted`: what was added is cut off, what was cut off is zero."""
    if not any(fit.low + fit.high):
        return gradient
    return F.pad(gradient, _pads(tuple(-n for n in fit.low), tuple(-n for n in fit.high)))


def _pads(low: Triple, high: Triple) -> tuple[int, ...]:
    return (low[2], high[2], low[1], high[1], low[0], high[0])


@dataclass(frozen=True)
class _Piece:
    """What one conv3d computes: output channels ``[first, end)`` of one view, whole groups or a part of one."""

    view: int
    first: int
    end: int
    first_group: int
    groups: int
    extent: Triple
    dilation: Triple
    fit: _Fit
    mirrored: _Fit
    weight_fit: _Fit

    @property
    def channels(self) -> int:
        return self.end - self.first

    def of_input(self, tensor: Tensor, groups: int) -> Tensor:
        """The piece's channels of a tensor with the input's channels."""
        if self.groups == groups:
            return tensor
        per_group = tensor.shape[1] // groups
        return tensor.narrow(1, self.first_group * per_group, self.groups * per_group)

    def of_output(self, tensor: Tensor, dim: int) -> Tensor:
        """The piece's channels of a tensor with the output's channels along ``dim``."""
        return tensor if tensor.shape[dim] == self.channels else tensor.narrow(dim, self.first, self.channels)

    def kernel(self, weight: Tensor) -> Tensor:
        return self.of_output(weight, 0).unsqueeze(self.view + 2)


@lru_cache(maxsize=4096)
def _pieces(geometry: Geometry, out_channels: int) -> tuple[_Piece, ...]:
    g = geometry
    views = ((g.views[0][0], 0, out_channels),) if g.coincident else g.views
    per_group = out_channels // g.groups
    pieces = []
    for view, first, end in views:
        start, extent, dilation = g.start[view], g.extent(view), g.dilation[view]
        fit = _fit(start, g.input_size, g.output_size, g.stride, extent, dilation)
        # oneDNN's weight gradient (PyTorch 2.14) is wrong, or writes where it must not, for float32 and
        # bfloat16 inputs that are no larger than the kernel along an axis that it pads itself.
        weight_fit = _fit(start, g.input_size, g.output_size, g.stride, extent, dilation, pads_small_inputs=False)
        mirrored_start = tuple(-s - (e - 1) * d for s, e, d in zip(start, extent, dilation, strict=True))
        mirrored = _fit(mirrored_start, g.output_size, g.input_size, (1, 1, 1), extent, dilation)
        while first < end:
            group, done = divmod(first, per_group)
            whole = (end - first) // per_group if done == 0 else 0
            stop = first + whole * per_group if whole else min(end, (group + 1) * per_group)
            pieces.append(_Piece(view, first, stop, group, max(whole, 1), extent, dilation, fit, mirrored, weight_fit))
            first = stop
    return tuple(pieces)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Forward: ``(N, C, D, H, W)`` and ``(O, C/groups, ku, kv)`` to ``(N, O, *geometry.output_size)``."""
    parts = []
    for piece in _pieces(geometry, weight.shape[0]):
        piece_bias = None if bias is None else piece.of_output(bias, 0)
        if piece.fit.outside:
            part = _constant(input, piece, piece_bias, geometry)
        else:
            part = F.conv3d(
                _fitted(piece.of_input(input, geometry.groups), piece.fit),
                piece.kernel(weight),
                piece_bias,
                geometry.stride,
                piece.fit.padding,
                piece.dilation,
                piece.groups,
            )
        parts.append(part)
    result = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return result.contiguous(memory_format=memory_format(input))


def _constant(input: Tensor, piece: _Piece, bias: Tensor | None, geometry: Geometry) -> Tensor:
    part = input.new_zeros((input.shape[0], piece.channels, *geometry.output_size))
    return part if bias is None else part + bias.view(1, -1, 1, 1, 1)


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Derivative for the input: ``(N, O, *geometry.output_size)`` to ``(N, C, *geometry.input_size)``."""
    pieces = [piece for piece in _pieces(geometry, weight.shape[0]) if not piece.fit.outside]
    parts = [_piece_input_grad(piece, grad_output, weight, geometry) for piece in pieces]
    spans = [(piece.first_group, piece.groups) for piece in pieces]
    if parts and all(span == (0, geometry.groups) for span in spans):
        result = parts[0]
        for part in parts[1:]:
            result.add_(part)
    elif _tiled(spans, geometry.groups):
        result = torch.cat(parts, 1)
    else:
        channels = weight.shape[1] * geometry.groups
        result = grad_output.new_zeros((grad_output.shape[0], channels, *geometry.input_size))
        for piece, part in zip(pieces, parts, strict=True):
            piece.of_input(result, geometry.groups).add_(part)
    return result.contiguous(memory_format=memory_format(grad_output))


def _tiled(spans, groups: int) -> bool:
    """Whether the spans ``(first, count)`` follow each other without gap or overlap."""
    ends = [0, *(first + count for first, count in spans)]
    return ends[-1] == groups and all(first == end for (first, _), end in zip(spans, ends, strict=False))


def _piece_input_grad(piece: _Piece, grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    grad, kernel = piece.of_output(grad_output, 1), piece.kernel(weight)
    if geometry.stride == (1, 1, 1):
        # oneDNN's forward is far faster than ATen's backward for depthwise layers, and never slower.
        return F.conv3d(
            _fitted(grad, piece.mirrored),
            _transposed(kernel, piece.groups),
            None,
            1,
            piece.mirrored.padding,
            piece.dilation,
            piece.groups,
        )
    size = [n + low + high for n, low, high in zip(geometry.input_size, piece.fit.low, piece.fit.high, strict=True)]
    like = torch.empty(
        (grad.shape[0], piece.groups * kernel.shape[1], *size),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=memory_format(grad_output),
    )
    return _unfitted(_conv_backward(piece, geometry, grad, like, kernel, piece.fit, (True, False, False))[0], piece.fit)


def _transposed(kernel: Tensor, groups: int) -> Tensor:
    """Kernel of the mirrored convolution: channels in and out exchanged in each group, taps reversed."""
    out_channels, in_channels = kernel.shape[:2]
    kernel = kernel.unflatten(0, (groups, out_channels // groups)).transpose(1, 2)
    return kernel.reshape(groups * in_channels, out_channels // groups, *kernel.shape[3:]).flip(2, 3, 4)


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """Derivative for the weight: ``(O, C/groups, ku, kv)``."""
    out_channels, group_channels = grad_output.shape[1], input.shape[1] // geometry.groups
    parts = []
    for piece in _pieces(geometry, out_channels):
        if piece.fit.outside:
            part = input.new_zeros((piece.channels, group_channels, *geometry.kernel_size))
        else:
            part = _conv_backward(
                piece,
                geometry,
                piece.of_output(grad_output, 1),
                _fitted(piece.of_input(input, geometry.groups), piece.weight_fit),
                input.new_empty((piece.channels, group_channels, *piece.extent)),
                piece.weight_fit,
                (False, True, False),
            )[1].squeeze(piece.view + 2)
        parts.append(part)
    result = parts[0] if len(parts) == 1 else torch.cat(parts)
    return result.contiguous()


def _conv_backward(piece: _Piece, geometry: Geometry, grad, input, kernel, fit: _Fit, mask):
    return torch.ops.aten.convolution_backward(
        grad,
        input,
        kernel,
        None,
        geometry.stride,
        fit.padding,
        piece.dilation,
        False,
        (0, 0, 0),
        piece.groups,
        mask,
    )
