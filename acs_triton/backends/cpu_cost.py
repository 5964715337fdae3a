"""Which form of a convolution's gradients is fastest on a CPU: the estimated times, compared.

* The *mirrored* form of the input's gradient is a forward convolution, which oneDNN has fast kernels for.
* The others are computed on the *volume* or on its *slices*. oneDNN has no 3D kernel for the gradients of
  depthwise layers, and PyTorch gives small volumes to its own ``slow_conv3d``. Slices are a batch of images, for
  which oneDNN has 2D kernels in every case; they cost a copy of what is not contiguous in memory.
* A kernel's gradient may have its operands *exchanged*: oneDNN's vectors run along the input's channels then.
* All of it may be *converted* to channels-last memory and back.

``python -m benchmarks.cpu_paths`` measures what following these estimates costs.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import memory_format
from . import onednn
from .pieces import Piece

# Rates of two cores of an AMD EPYC (AVX-512), in multiply-adds or bytes a microsecond; only their ratios matter.
_ONEDNN = 80_000
_ONEDNN_GRADIENT_OF_VOLUME = 75_000
_ONEDNN_STRIDED_INPUT_GRADIENT_OF_VOLUME = 32_000
_DEPTHWISE_GRADIENT_OF_VOLUME = 3_700
_DEPTHWISE_GRADIENT_OF_SLICES = 6_800
_COPY = 2_500  # to another memory format
_COPY_OF_ROWS = 5_000  # of channels that lie together, or are few
_REORDER = 700  # of a kernel by oneDNN's 2D gradients
_LANES = 16
_FEW_POSITIONS = 512


def mirrored(grad_output: Tensor, kernel: Tensor, geometry: Geometry) -> bool:
    """Whether the input's gradient of a piece is computed as a convolution with the mirrored kernel."""
    return max(geometry.stride) == 1 and onednn.worthwhile(grad_output, kernel)


def by_taps(grad_output: Tensor, input: Tensor, geometry: Geometry) -> bool:
    """Whether the weight's gradient is computed as a product of matrices for each tap.

    Of few positions and many channels oneDNN's products take less time than its reorderings of the kernel, which
    it also holds several times.
    """
    few = grad_output[:, 0].numel() <= _FEW_POSITIONS and geometry.groups == 1
    out_channels = grad_output.shape[1]
    if not few or min(out_channels, input.shape[1]) < _LANES or not onednn.usable(grad_output):
        return False
    return out_channels * prod(geometry.kernel_size) > input[:, 0].numel()


def exchanged(grad: Tensor, input: Tensor, kernel: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a kernel's gradient is computed with input and output's gradient in each other's place.

    ``sum_p g[p, o] x[p + t, c]`` is then the gradient of the mirrored kernel, whose output has the
    input's channels: oneDNN's vectors run along these, of which fewer may be left over. In other memory than
    channels-last it reorders both, and nothing is gained.
    """
    if max(stride) > 1 or grad.stride(1) != 1 or input.stride(1) != 1:
        return False
    channels = input.shape[1] // groups, grad.shape[1] // groups
    if not onednn.usable(grad) or _fewest_filled(*channels) == _filled(*channels):
        return False
    padding = exchanged_padding(kernel, padding, dilation)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)]
    # oneDNN's weight gradient may not pad an axis that the kernel spans, see `pieces_of`.
    if any(pad < 0 or (pad and n <= k) for pad, n, k in zip(padding, grad.shape[2:], reach, strict=True)):
        return False
    return _takes_onednn(grad, input.shape[1], kernel.shape[2:], stride, padding, dilation, groups)


def exchanged_padding(kernel: Tensor, padding, dilation) -> tuple[int, ...]:
    """The padding of the mirrored convolution at stride 1."""
    return tuple((k - 1) * d - pad for k, d, pad in zip(kernel.shape[2:], dilation, padding, strict=True))


def by_slices(
    piece: Piece, geometry: Geometry, input: Tensor, grad_output: Tensor, kernel: Tensor, mask: tuple[bool, bool, bool]
) -> bool:
    """Whether gradients of a piece are computed on slices.

    Args:
        input: the piece's channels of the input (its shape, dtype and strides count).
        grad_output: the piece's channels of the output's gradient.
        kernel: the piece's kernel (its size counts).
        mask: whether the gradients of input, kernel and bias are asked for.
    """
    if piece.slices.count == 0 or not onednn.usable(grad_output):
        return False
    last = memory_format(input) == torch.channels_last_3d
    volume, slices = _times(piece, geometry, input, grad_output, kernel, mask, last)
    return slices < volume


def converted(
    pieces: tuple[Piece, ...],
    geometry: Geometry,
    input: Tensor,
    grad_output: Tensor,
    weight: Tensor,
    wanted: tuple[bool, bool],
) -> bool:
    """Whether gradients in plain memory are worth a conversion of it all to channels-last and back.

    Args:
        input, grad_output, weight: of the convolution (their shapes and dtype count).
        wanted: whether the gradients of input and weight are asked for.
    """
    if not onednn.usable(grad_output):
        return False
    copied = grad_output.numel() + sum(wanted) * input.numel()
    times = [0.0, copied * grad_output.element_size() / _COPY]
    for piece in pieces:
        if piece.fit.outside:
            continue
        data, kernel = piece.of_input(input, geometry.groups), piece.of_output(weight, 0)
        grad = piece.of_output(grad_output, 1)
        forward = wanted[0] and mirrored(grad, kernel, geometry)
        mask = wanted[0] and not forward, wanted[1], False
        channels, positions = data.shape[1], prod(piece.extent) * grad[:, 0].numel()
        for last in (False, True):
            if forward and piece.groups == 1:
                # Of plain memory oneDNN makes blocks of channels, and fills them up.
                summed = piece.channels if last else _filled(1, piece.channels)
                times[last] += positions * _filled(summed, channels) / _ONEDNN
            if any(mask):
                times[last] += min(_times(piece, geometry, data, grad, kernel, mask, last))
    return times[1] < times[0]


def _times(
    piece: Piece, geometry: Geometry, input: Tensor, grad_output: Tensor, kernel: Tensor, mask, last: bool
) -> tuple[float, float]:
    """Microseconds on the volume and on its slices; ``last``: all is channels-last. Else as :func:`by_slices`."""
    asked, strided = sum(mask), max(geometry.stride) > 1
    group_in, group_out = input.shape[1] // piece.groups, piece.channels // piece.groups
    positions = prod(piece.extent) * grad_output[:, 0].numel()
    copy = input.numel() * input.element_size() / (_COPY_OF_ROWS if last or input.shape[1] < _LANES // 2 else _COPY)
    # The input's gradient is cleared, and its planes written.
    copies = mask[1] / (geometry.stride[piece.view] if last else 1) + 2 * mask[0]
    if last and piece.view == 0 and geometry.stride[0] == 1 and not mask[0]:
        copies = 0  # the slices lie in the volume
    if group_in == 1 and piece.groups > 1:
        work = asked * positions * _filled(1, piece.channels)
        volume = work / _DEPTHWISE_GRADIENT_OF_VOLUME + (1 + 2 * mask[0]) * copy
        return volume, work / _DEPTHWISE_GRADIENT_OF_SLICES + copies * copy
    # Vectors run along the channels; those of another group cannot fill them up.
    work = positions * piece.groups * _filled(group_in, group_out)
    fewest = work if strided or mask[0] else positions * piece.groups * _fewest_filled(group_in, group_out)
    # The kernel and its gradient are reordered too, which outweighs the rest where they are large.
    reorder = kernel.numel() * kernel.element_size() / _REORDER
    slices = asked * (fewest / _ONEDNN + reorder) + copies * copy + onednn.START
    operands = piece.extent, geometry.stride, piece.fit.padding, piece.dilation, piece.groups
    if not _takes_onednn(input, piece.channels, *operands):
        volume = asked * positions * piece.groups * group_in * group_out / onednn.SLOW_CONV3D
        volume += (2 * mask[0] + last) * copy
    elif mask[0]:
        rate = _ONEDNN_STRIDED_INPUT_GRADIENT_OF_VOLUME if strided else _ONEDNN_GRADIENT_OF_VOLUME
        volume = work / rate + mask[1] * work / _ONEDNN_GRADIENT_OF_VOLUME + (0 if last else 2 * copy)
    elif last and _takes_onednn(grad_output, input.shape[1], *operands):
        volume = fewest / _ONEDNN_GRADIENT_OF_VOLUME
    else:
        volume = work / _ONEDNN_GRADIENT_OF_VOLUME
    return volume, slices


def _filled(others: int, along: int) -> int:
    """Products of two runs of channels at a position, where vectors run along the second and are filled up."""
    return others * -(-along // _LANES) * _LANES


def _fewest_filled(in_channels: int, out_channels: int) -> int:
    """:func:`_filled` of a kernel's gradient at stride 1, whose vectors may run along both."""
    return min(_filled(in_channels, out_channels), _filled(out_channels, in_channels))


def _takes_onednn(input: Tensor, out_channels: int, extent, stride, padding, dilation, groups: int) -> bool:
    """Whether PyTorch's own choice for a convolution is oneDNN."""
    kernel = input.new_empty((out_channels, input.shape[1] // groups, *extent))
    zeros = (0,) * len(extent)
    backend = torch._C._select_conv_backend(input, kernel, None, stride, padding, dilation, False, zeros, groups)
    return backend == torch._C._ConvBackend.Mkldnn
