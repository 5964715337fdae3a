"""Convolutions of few positions and many channels, as products of matrices with the weight as it lies.

All that positions read is laid side by side (im2col): a row has the ``C x ku x kv`` values of one position, in the
order of a weight's row. So the forward pass and both gradients are one product for each view, and nothing of the
size of the weight is reordered, which takes oneDNN longer than such a layer's arithmetic.

Non-finite values: where a tap reads outside the input, an infinite or NaN value of the output's gradient meets a zero,
and makes the weight's gradient NaN at that tap too (as PyTorch's own ``slow_conv3d`` does).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..geometry import Geometry, reach
from .pieces import Piece, cut, pieces_of


def windows(piece: Piece, geometry: Geometry):
    """For each tap the output positions that read inside the input through it, and the input positions they read."""
    for tap in geometry.taps(piece.view):
        written, read = [slice(None)], [slice(None)]
        for position, size, out, stride in zip(
            tap, geometry.input_size, geometry.output_size, geometry.stride, strict=True
        ):
            first, end = reach(position, size, out, stride)
            position += first * stride
            written.append(slice(first, end))
            read.append(slice(position, position + (end - first) * stride, stride))
        yield tuple(written), tuple(read)


def _columns(input: Tensor, piece: Piece, geometry: Geometry) -> Tensor:
    """``(N, C, D, H, W)`` to ``(N * positions, C * ku * kv)``."""
    data, taps = input.movedim(1, -1), prod(geometry.kernel_size)
    columns = input.new_zeros(data.shape[0], *geometry.output_size, data.shape[-1], taps)
    for number, (written, read) in enumerate(windows(piece, geometry)):
        columns[written][..., number] = data[read]
    return columns.flatten(0, 3).flatten(1)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of one group, channels-last."""
    pieces = pieces_of(geometry, weight.shape[0], True)
    biases = [None] * len(pieces) if bias is None else cut(bias, pieces)
    parts = []
    for piece, kernel, of in zip(pieces, cut(weight, pieces), biases, strict=True):
        columns, matrix = _columns(input, piece, geometry), kernel.flatten(1).t()
        parts.append(columns @ matrix if of is None else torch.addmm(of, columns, matrix))
    result = torch.cat(parts, 1)
    return result.unflatten(0, (input.shape[0], *geometry.output_size)).movedim(-1, 1)


def gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the input, channels-last, and of the weight; each needs the other one."""
    out_channels = grad_output.shape[1]
    grads = grad_output.movedim(1, -1).reshape(-1, out_channels)
    pieces = pieces_of(geometry, out_channels, True)
    total = for_weight = None
    if weight is not None:
        total = weight.new_zeros(grad_output.shape[0], *geometry.input_size, weight.shape[1])
    if input is not None:
        for_weight = input.new_empty(out_channels, input.shape[1], *geometry.kernel_size)
    for piece in pieces:
        rows = grads[:, piece.first : piece.end]
        if input is not None:
            kernel = for_weight[piece.first : piece.end].flatten(1)
            torch.mm(rows.t(), _columns(input, piece, geometry), out=kernel)
        if weight is not None:
            columns = rows @ weight[piece.first : piece.end].flatten(1)
            columns = columns.view(-1, *geometry.output_size, weight.shape[1], prod(geometry.kernel_size))
            for number, (written, read) in enumerate(windows(piece, geometry)):
                total[read] += columns[written][..., number]
    return None if total is None else total.movedim(-1, 1), for_weight
