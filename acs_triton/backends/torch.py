"""The primitives in PyTorch's own convolutions (oneDNN on CPUs, cuDNN on GPUs)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..activations import activate_
from ..geometry import Geometry
from ..layout import converted, empty, memory_format
from . import columns, cpu_cost, depthwise, forms, mixed, onednn
from .pieces import Piece, cut, pieces_of

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
    result = empty(input, shape, format)
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
    """Both derivatives.

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
    wanted = weight is not None, input is not None
    channels = weight.shape[1] * groups if wanted[0] else input.shape[1]
    pieces = pieces_of(geometry, grad_output.shape[1], _on_cpu(grad_output))
    size = grad_output.shape[0], channels, *geometry.input_size
    # Of an operand whose partner's gradient is not asked for, the shape counts alone, and takes no memory yet.
    data = input if wanted[1] else torch.empty(size, dtype=grad_output.dtype, device="meta", memory_format=format)
    shape = grad_output.shape[1], channels // groups, *geometry.kernel_size
    kernels = weight if wanted[0] else grad_output.new_empty(shape)
    plan = cpu_cost.plan(geometry, grad_output, data, wanted)
    if plan.depthwise:
        return depthwise.gradients(grad_output, input, weight, geometry, format)
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
    how = [forms.Form(*form) for form in zip(pieces, cut(kernels, pieces), plan.mirrored, plan.sliced, strict=True)]
    if by_pieces:
        forms.weight_grads(for_weight, how, geometry, grad_output, data, alone=not wanted[0])
    for_input = None
    if wanted[0]:
        for_input = forms.input_grads(for_weight, how, geometry, grad_output, data)
    if plan.by_taps:
        for_weight = forms.by_taps(grad_output, input, geometry)
    return for_input, for_weight


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
