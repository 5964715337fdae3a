"""The primitives in PyTorch's own convolutions (oneDNN on CPUs, cuDNN on GPUs)."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import activate_
from ..geometry import Geometry
from ..layout import converted, memory_format
from . import columns, cpu_cost, depthwise, mixed, onednn
from .pieces import Piece, cut, is_batch, pieces_of

_SMALL = 1 << 16
"""Elements of a result whose parts may be held beside it, for one call less for each."""


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Forward: ``(N, C, D, H, W)`` and ``(O, C/groups, ku, kv)`` to ``(N, O, *geometry.output_size)``."""
    if geometry.mixed:
        return mixed.conv(conv, mixed.fewest_taps(geometry, weight.shape[0]), input, weight, bias, geometry)
    format = memory_format(input)
    if cpu_cost.by_columns(geometry, input, weight):
        return columns.conv(input, weight, bias, geometry)
    pieces = pieces_of(geometry, weight.shape[0], _on_cpu(input))
    biases, kernels = (None,) * len(pieces) if bias is None else cut(bias, pieces), cut(weight, pieces)
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
        return _mixed_gradients(grad_output, input, weight, geometry)
    if grad_output.dtype == torch.float16 and _on_cpu(grad_output):
        # PyTorch's own gradients sum up taps in float16.
        wide = [None if one is None else one.float() for one in (grad_output, input, weight)]
        return tuple(None if one is None else one.half() for one in _gradients(*wide, geometry))
    return _gradients(grad_output, input, weight, geometry)


def _mixed_gradients(grad_output: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry):
    """:func:`gradients` of mixed views; where one of the weight's would be converted to channels-last, all are, once.

    oneDNN's kernels for the weight's gradient take longer for few taps that are apart than for all taps of a view.
    """
    out_channels, format = grad_output.shape[1], memory_format(grad_output)
    views, fewest = mixed.views(geometry, out_channels), mixed.fewest_taps(geometry, out_channels)
    for_input = for_weight = None
    if input is not None:
        plans = (cpu_cost.plan(view, grad_output, input, (False, True)) for _, view in views.planes)
        if any(plan.converted for plan in plans):
            grad_output, input = (converted(one, torch.channels_last_3d) for one in (grad_output, input))
        _, for_weight = mixed.gradients(gradients, views, grad_output, input, None, geometry)
    del input  # before the input's gradient is made
    if weight is not None:
        for_input, _ = mixed.gradients(gradients, fewest, grad_output, None, weight, geometry)
        for_input = converted(for_input, format)
    return for_input, for_weight


def _gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry, converts: bool = True
):
    """:func:`gradients` of views that are not mixed; ``converts``: as channels-last, if that is faster."""
    format, groups = memory_format(grad_output), geometry.groups
    if depthwise.suits(grad_output, channels := (geometry.groups if input is None else input.shape[1]), geometry):
        return depthwise.gradients(grad_output, input, weight, geometry, format)
    pieces = pieces_of(geometry, grad_output.shape[1], _on_cpu(grad_output))
    wanted = weight is not None, input is not None
    channels = weight.shape[1] * groups if wanted[0] else input.shape[1]
    size = grad_output.shape[0], channels, *geometry.input_size
    # Of an operand whose partner's gradient is not asked for, the shape counts alone, and takes no memory yet.
    data = input if wanted[1] else torch.empty(size, dtype=grad_output.dtype, device="meta", memory_format=format)
    shape = grad_output.shape[1], channels // groups, *geometry.kernel_size
    kernels = weight if wanted[0] else grad_output.new_empty(shape)
    plan = cpu_cost.plan(geometry, grad_output, data, wanted)
    if plan.by_columns:
        for_input, for_weight = columns.gradients(grad_output, input, weight, geometry)
        return None if for_input is None else converted(for_input, format), for_weight
    if converts and plan.converted:
        last = [None if one is None else converted(one, torch.channels_last_3d) for one in (grad_output, input)]
        for_input, for_weight = _gradients(*last, weight, geometry, converts=False)
        del last  # before the conversion back
        return None if for_input is None else converted(for_input, format), for_weight
    by_pieces = wanted[1] and not plan.by_taps
    for_weight = None if not by_pieces else torch.empty_like(kernels) if wanted[0] else kernels
    forms = [_Form(*form) for form in zip(pieces, cut(kernels, pieces), plan.mirrored, plan.sliced, strict=True)]
    if by_pieces:
        _weight_grads(for_weight, forms, geometry, grad_output, data, alone=not wanted[0])
    for_input = None
    if wanted[0]:
        for_input = _input_grads(for_weight, forms, geometry, grad_output, data)
    if plan.by_taps:
        for_weight = _by_taps(grad_output, input, geometry)
    return for_input, for_weight


class _Form(NamedTuple):
    """A piece and its kernel, and how the gradients are computed (see :class:`.cpu_cost.Plan`)."""

    piece: Piece
    kernel: Tensor
    mirrored: bool
    sliced: bool


def _weight_grads(result: Tensor, forms: list[_Form], geometry: Geometry, grad_output, input, alone: bool) -> None:
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


def _input_grads(for_weight: Tensor | None, forms: list[_Form], geometry: Geometry, grad_output, input) -> Tensor:
    """That of the input; those of kernels that come together with it are written to ``for_weight``, if there is one."""
    format, groups, strided = memory_format(grad_output), geometry.groups, max(geometry.stride) > 1
    # Positions that are apart are added at the memory's speed where their channels lie together.
    sum_format = torch.channels_last_3d if strided and all(form.mirrored for form in forms) else format
    # Pieces that reach all channels are added up as they come; others are added to a part of the sum.
    whole = all(form.piece.groups == groups and not form.piece.fit.outside for form in forms)
    total = None if whole else _empty(grad_output, input.shape, sum_format).zero_()
    for piece, kernel, mirrored, sliced in forms:
        if piece.fit.outside:
            continue
        if total is None and (strided if mirrored else sliced):
            total = _empty(grad_output, input.shape, sum_format).zero_()
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


def _by_taps(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
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
        for_planes, for_kernel, _ = _backward(
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
    for_input, for_kernel, _ = _backward(
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


def _backward(grad, input, kernel, stride, padding, dilation, groups: int, mask):
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


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _empty(like: Tensor, size, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)
