"""The primitives in PyTorch's own convolutions (oneDNN on CPUs, cuDNN on GPUs)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..activations import activate_
from ..geometry import Geometry
from ..layout import converted, memory_format
from . import mixed, onednn
from .pieces import Piece, cut, pieces_of


_SMALL = 1 << 16
"""Elements of a result whose parts may be held beside it, for one call less for each."""


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Forward: ``(N, C, D, H, W)`` and ``(O, C/groups, ku, kv)`` to ``(N, O, *geometry.output_size)``."""
    if geometry.mixed:
        return mixed.conv(conv, mixed.fewest_taps(geometry, weight.shape[0]), input, weight, bias, geometry)
    format, pieces = memory_format(input), pieces_of(geometry, weight.shape[0])
    biases = (None,) * len(pieces) if bias is None else cut(bias, pieces)
    kernels = cut(weight, pieces)
    shape = input.shape[0], weight.shape[0], *geometry.output_size
    if not any(piece.fit.outside for piece in pieces) and (len(pieces) == 1 or prod(shape) <= _SMALL):
        parts = [_piece_conv(piece, geometry, input, *of) for piece, *of in zip(pieces, kernels, biases, strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).contiguous(memory_format=format)
    # Written part by part, so that one part at a time is held beside the result.
    result = _empty(input, shape, format)
    for piece, kernel, piece_bias in zip(pieces, kernels, biases, strict=True):
        piece.of_output(result, 1).copy_(_piece_conv(piece, geometry, input, kernel, piece_bias))
    return result


def conv_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, geometry: Geometry) -> Tensor:
    """An activation of :func:`conv`."""
    return activate_(conv(input, weight, bias, geometry), activation)


def _piece_conv(piece: Piece, geometry: Geometry, input: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The piece's channels of the output, or what broadcasts to them."""
    fit = piece.fit
    if fit.outside:
        return input.new_zeros(()) if bias is None else bias.view(-1, 1, 1, 1)
    data, kernel = fit.apply(piece.of_input(input, geometry.groups)), kernel.unsqueeze(piece.view + 2)
    return onednn.conv3d(data, kernel, bias, geometry.stride, fit.padding, piece.dilation, piece.groups)


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Derivative for the input: ``(N, O, *geometry.output_size)`` to ``(N, C, *geometry.input_size)``."""
    return gradients(grad_output, None, weight, geometry)[0]


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """Derivative for the weight: ``(O, C/groups, ku, kv)``."""
    return gradients(grad_output, input, None, geometry)[1]


def gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry
) -> tuple[Tensor | None, Tensor | None]:
    """Both derivatives, for which the output's gradient is cut into pieces once.

    The input's needs ``weight`` and the weight's needs ``input``; None where that is None.
    """
    if geometry.mixed:
        planes = mixed.fewest_taps(geometry, grad_output.shape[1])
        return mixed.gradients(gradients, planes, grad_output, input, weight, geometry)
    format, groups = memory_format(grad_output), geometry.groups
    pieces = pieces_of(geometry, grad_output.shape[1])
    (channels, like) = (input.shape[1], input) if weight is None else (weight.shape[1] * groups, weight)
    size = grad_output.shape[0], channels, *geometry.input_size
    wanted = weight is not None, input is not None
    if format == torch.contiguous_format and onednn.better_channels_last(pieces, geometry, grad_output, size, *wanted):
        last = [None if one is None else converted(one, torch.channels_last_3d) for one in (grad_output, input)]
        for_input, for_weight = gradients(*last, weight, geometry)
        return None if for_input is None else converted(for_input, format), for_weight
    # Pieces that reach all channels are added up as they come; others are added to a part of the sum.
    whole = all(piece.groups == groups and not piece.fit.outside for piece in pieces)
    total = None if whole or weight is None else _empty(grad_output, size, format).zero_()
    # Positions that are apart are added at the memory's speed where their channels lie together.
    apart = whole and geometry.stride != (1, 1, 1)
    sum_format = torch.channels_last_3d if apart else format
    for_kernels = []
    for piece in pieces:
        shape = piece.channels, channels // groups, *geometry.kernel_size
        if piece.fit.outside:
            for_kernels.append(like.new_zeros(shape))
            continue
        grad = piece.of_output(grad_output, 1)
        kernel = like.new_empty(shape) if weight is None else piece.of_output(weight, 0)
        data = piece.of_input(_empty(grad_output, size, format) if input is None else input, groups)
        mirrored = weight is not None and onednn.better_mirrored(grad, kernel, data, len(piece.mirrored))
        mask = weight is not None and not mirrored, input is not None, False
        sliced = any(mask) and onednn.by_slices(piece, geometry, data, grad, kernel, not mask[0])
        backward = _on_slices if sliced else _on_volume
        if backward is _on_volume:
            grad = grad.contiguous(memory_format=format)  # once for both derivatives
        part, for_kernel = backward(piece, geometry, grad, data, kernel, mask) if any(mask) else (None, None)
        if for_kernel is not None:
            for_kernels.append(for_kernel.contiguous())
        del data, for_kernel
        if mirrored:
            if apart and total is None:
                total = _empty(grad, size, sum_format).zero_()
            total = _add_mirrored(total, piece, geometry, grad.contiguous(memory_format=sum_format), weight)
        elif part is not None:
            if total is None:
                total = part
            else:
                piece.of_input(total, groups).add_(part)
        del grad, part  # before the next piece's are made
    for_weight = None if input is None else torch.cat(for_kernels)
    return None if weight is None else total.contiguous(memory_format=format), for_weight


def _add_mirrored(total: Tensor | None, piece: Piece, geometry: Geometry, grad: Tensor, weight: Tensor) -> Tensor:
    """``total`` and the piece's part of the input's gradient, by convolutions with the mirrored kernel.

    At stride 1 the part is the result if there is no ``total``; the piece then reaches all channels.
    """
    for one in piece.mirrored:
        kernel = _transposed(piece.kernel(weight)[(..., *one.taps)], piece.groups)
        operands = one.fit.apply(grad), kernel, None, (1, 1, 1), one.fit.padding, one.dilation, piece.groups
        if piece.groups == geometry.groups and geometry.stride == (1, 1, 1):
            total = onednn.conv3d(*operands, total=total)
        else:
            piece.of_input(total, geometry.groups)[(..., *one.positions)].add_(onednn.conv3d(*operands))
    return total


# The gradients that ``mask`` asks for, of a piece's input channels and of its kernel, by PyTorch's own
# backward. Of an operand whose partner's gradient is not asked for, the shape counts alone.


def _on_slices(piece: Piece, geometry: Geometry, grad: Tensor, input: Tensor, kernel: Tensor, mask):
    slices = piece.slices
    fit = slices.weight_fit if mask[1] else slices.fit
    planes = fit.apply(slices.of_input(input))
    for_planes, for_kernel, _ = _backward(
        slices.of_output(grad), planes, kernel, slices.stride, fit.padding, slices.dilation, piece.groups, mask
    )
    if for_planes is None:
        return None, for_kernel
    for_input = torch.zeros_like(input)
    planes = slices.planes_of_input(for_input)
    planes.copy_(fit.undo(for_planes).unflatten(0, planes.shape[:2]))
    return for_input, for_kernel


def _on_volume(piece: Piece, geometry: Geometry, grad: Tensor, input: Tensor, kernel: Tensor, mask):
    fit, axis = piece.weight_fit if mask[1] else piece.fit, piece.view + 2
    kernel = kernel.unsqueeze(axis)
    for_input, for_kernel, _ = _backward(
        grad, fit.apply(input), kernel, geometry.stride, fit.padding, piece.dilation, piece.groups, mask
    )
    return (
        None if for_input is None else fit.undo(for_input),
        None if for_kernel is None else for_kernel.squeeze(axis),
    )


def _transposed(kernel: Tensor, groups: int) -> Tensor:
    """Kernel of the mirrored convolution: channels in and out exchanged in each group, taps reversed."""
    out_channels, in_channels = kernel.shape[:2]
    kernel = kernel.unflatten(0, (groups, out_channels // groups)).transpose(1, 2)
    kernel = kernel.reshape(groups * in_channels, out_channels // groups, *kernel.shape[3:])
    return kernel.flip(tuple(range(2, kernel.dim())))


def _backward(grad, input, kernel, stride, padding, dilation, groups: int, mask):
    """``(input's, weight's, bias's)`` gradients of a convolution of any dimension, where ``mask`` asks for them."""
    zeros = (0,) * len(stride)
    exchanged = not mask[0] and onednn.better_exchanged(grad, input, kernel, stride, padding, dilation, groups)
    if exchanged:
        grad, input, kernel = input, grad, _transposed(kernel, groups)
        padding = onednn.exchanged_padding(kernel, padding, dilation)
    for_input, for_kernel, for_bias = torch.ops.aten.convolution_backward(
        grad, input, kernel, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return for_input, _transposed(for_kernel, groups) if exchanged else for_kernel, for_bias


def _empty(like: Tensor, size, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)
