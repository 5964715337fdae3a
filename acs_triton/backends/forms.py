"""The forms of a convolution's gradients in PyTorch's own convolutions, among which :mod:`.cpu_cost` chooses."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import converted, empty, memory_format
from . import columns, cpu_cost, onednn
from .pieces import Piece, is_batch, pieces_of


class Form(NamedTuple):
    """A piece and its kernel, and how the gradients are computed (see :class:`.cpu_cost.Plan`)."""

    piece: Piece
    kernel: Tensor
    mirrored: bool
    sliced: bool


def weight_grads(result: Tensor, forms: list[Form], geometry: Geometry, grad_output, input, alone: bool) -> None:
    """Written to ``result`` where they do not come together with the input's, as none does that is asked for alone.

    What they hold is given back before the input's gradient is made.
    """
    for piece, kernel, mirrored, sliced in forms:
        if piece.fit.outside:
            piece.of_output(result, 0).zero_()
        elif mirrored or alone:
            operands = piece.of_output(grad_output, 1), piece.of_input(input, geometry.groups), kernel
            compute = _on_slices if sliced else _on_volume
            piece.of_output(result, 0).copy_(compute(piece, geometry, *operands, (False, True, False), None)[1])


def input_grads(for_weight: Tensor | None, forms: list[Form], geometry: Geometry, grad_output, input) -> Tensor:
    """That of the input; those of kernels that come together with it are written to ``for_weight``, if there is one."""
    format, groups, strided = memory_format(grad_output), geometry.groups, max(geometry.stride) > 1
    # Positions that are apart are added at the memory's speed where their channels lie together.
    sum_format = torch.channels_last_3d if strided and all(form.mirrored for form in forms) else format
    # Pieces that reach all channels are added up as they come; others are added to a part of the sum.
    whole = all(form.piece.groups == groups and not form.piece.fit.outside for form in forms)
    total = None if whole else empty(grad_output, input.shape, sum_format).zero_()
    for piece, kernel, mirrored, sliced in forms:
        if piece.fit.outside:
            continue
        if total is None and (strided if mirrored else sliced):
            total = empty(grad_output, input.shape, sum_format).zero_()
        grad = piece.of_output(grad_output, 1)
        if mirrored:
            grad = grad if strided else grad.contiguous(memory_format=format)
            total = _add_mirrored(total, piece, geometry, grad, kernel)
            continue
        compute, mask = _on_slices if sliced else _on_volume, (True, for_weight is not None, False)
        of_total = None if total is None else piece.of_input(total, groups)
        data = piece.of_input(input, groups)
        data = torch.empty_like(data, device=grad.device) if data.is_meta else data
        of_input, for_kernel = compute(piece, geometry, grad, data, kernel, mask, of_total)
        total = of_input if total is None else total
        if for_kernel is not None:
            piece.of_output(for_weight, 0).copy_(for_kernel)
        del grad, data, of_input, for_kernel  # before the next piece's are made
    return converted(total, format)


def by_taps(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """The weight's gradient of one group, as a product of matrices for each tap."""
    grads, data = (converted(one, torch.channels_last_3d).movedim(1, -1) for one in (grad_output, input))
    for_weight = input.new_empty(grads.shape[-1], data.shape[-1], prod(geometry.kernel_size))
    for piece in pieces_of(geometry, grads.shape[-1], True):
        for number, (written, read) in enumerate(columns.windows(piece, geometry)):
            rows = grads[(*written, slice(piece.first, piece.end))].reshape(-1, piece.channels)
            for_weight[piece.first : piece.end, :, number] = rows.t() @ data[read].reshape(-1, data.shape[-1])
    return for_weight.unflatten(2, geometry.kernel_size)


def _add_mirrored(total: Tensor | None, piece: Piece, geometry: Geometry, grad: Tensor, kernel: Tensor) -> Tensor:
    """``total`` and the piece's part of the input's gradient, by convolutions with the mirrored kernel.

    At stride 1 the part is the result if there is no ``total``; the piece then reaches all channels.
    """
    kernel = kernel.unsqueeze(piece.view + 2)
    for one in piece.mirrored:
        taps = _transposed(kernel[(..., *one.taps)], piece.groups)
        operands = one.fit.apply(grad), taps, None, (1, 1, 1), one.fit.padding, one.dilation, piece.groups
        if piece.groups == geometry.groups and geometry.stride == (1, 1, 1):
            total = onednn.conv3d(*operands, total=total)
        else:
            piece.of_input(total, geometry.groups)[(..., *one.positions)].add_(onednn.conv3d(*operands))
    return total


# The gradients that ``mask`` asks for, of a piece's input channels and of its kernel, by PyTorch's own backward. The
# input's is added to ``total`` and returned; on slices there is a total.


def _on_slices(piece: Piece, geometry: Geometry, grad, input, kernel, mask, total: Tensor | None):
    # All at once where none are copied.
    copied = mask[0] or not is_batch(piece.slices.planes_of_input(input))
    most = cpu_cost.part(input.numel() * input.element_size(), mask[:2])
    sums = None
    for slices in piece.slices.parts(input, most) if copied else (piece.slices,):
        fit = slices.weight_fit if mask[1] else slices.fit
        planes = fit.apply(slices.of_input(input))
        for_planes, for_kernel, _ = backward(
            slices.of_output(grad), planes, kernel, slices.stride, fit.padding, slices.dilation, piece.groups, mask
        )
        del planes
        if for_planes is not None:
            planes = slices.planes_of_input(total)
            planes.add_(fit.undo(for_planes).unflatten(0, planes.shape[:2]))
        if for_kernel is not None:
            wide = for_kernel.to(torch.promote_types(for_kernel.dtype, torch.float32))
            sums = wide if sums is None else sums.add_(wide)
            del wide
        del for_planes, for_kernel  # before the next part's are made
    return total, None if sums is None else sums.to(input.dtype)


def _on_volume(piece: Piece, geometry: Geometry, grad, input, kernel, mask, total: Tensor | None):
    fit, axis = piece.weight_fit if mask[1] else piece.fit, piece.view + 2
    grad, kernel = grad.contiguous(memory_format=memory_format(grad)), kernel.unsqueeze(axis)
    for_input, for_kernel, _ = backward(
        grad, fit.apply(input), kernel, geometry.stride, fit.padding, piece.dilation, piece.groups, mask
    )
    if for_input is not None:
        for_input = fit.undo(for_input)
        total = for_input if total is None else total.add_(for_input)
    return total, None if for_kernel is None else for_kernel.squeeze(axis)


def _transposed(kernel: Tensor, groups: int) -> Tensor:
    """Kernel of the mirrored convolution: channels in and out exchanged in each group, taps reversed."""
    out_channels, in_channels = kernel.shape[:2]
    kernel = kernel.unflatten(0, (groups, out_channels // groups)).transpose(1, 2)
    kernel = kernel.reshape(groups * in_channels, out_channels // groups, *kernel.shape[3:])
    return kernel.flip(tuple(range(2, kernel.dim())))


def backward(grad, input, kernel, stride, padding, dilation, groups: int, mask):
    """``(input's, weight's, bias's)`` gradients of a convolution of any dimension, where ``mask`` asks for them."""
    zeros = (0,) * len(stride)
    exchanged = not mask[0] and cpu_cost.exchanged(grad, input, kernel, stride, padding, dilation, groups)
    if exchanged:
        grad, input, kernel = input, grad, _transposed(kernel, groups)
        padding = cpu_cost.exchanged_padding(kernel.shape[2:], padding, dilation)
    for_input, for_kernel, for_bias = torch.ops.aten.convolution_backward(
        grad, input, kernel, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return for_input, _transposed(for_kernel, groups) if exchanged else for_kernel, for_bias
