"""How a CPU's convolutions are had from oneDNN, at its best.

PyTorch decides convolution by convolution whether oneDNN or its own ``slow_conv3d`` computes it,
by a rule made for 2D: a single volume with fewer than about 20,000 elements in ``C * D * H`` is
thought small, however large its kernel or its width. And oneDNN has no 3D kernel for the
gradients of depthwise layers. So

* forward convolutions, and input gradients, which are forward convolutions with the mirrored
  kernel (at a stride, with the taps of one class of positions at a time), are handed to oneDNN
  directly where they are worth its start-up time;
* the other gradients are computed on the volume or on its slices, whichever :func:`by_slices`
  estimates to be faster. For slices, a batch of images, PyTorch takes oneDNN, which has 2D
  kernels for every case; they cost a copy of what is not contiguous in memory.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from .pieces import Piece

# Rates of two cores of an AMD EPYC (AVX-512), in multiply-adds or bytes a microsecond; only their
# ratios matter here. `python -m benchmarks.cpu_paths` measures what following them costs.
_ONEDNN = 80_000
_ONEDNN_GRADIENT_OF_VOLUME = 75_000
_ONEDNN_DEPTHWISE_GRADIENT_OF_VOLUME = 2_500
_ONEDNN_DEPTHWISE_GRADIENT_OF_SLICES = 12_000
_SLOW_CONV3D = 15_000
_COPY = 3_000
_GATHER = 300  # copies of single taps of a kernel
_ONEDNN_START = 40  # microseconds
_LANES = 16


def usable(tensor: Tensor) -> bool:
    """Whether oneDNN can compute a convolution of this tensor."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or not _enabled():
        return False
    if tensor.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tensor.dtype == torch.float32


def _enabled() -> bool:
    return torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()


def worthwhile(volume: Tensor, kernel: Tensor, stride=(1, 1, 1), convolutions: int = 1) -> bool:
    """Whether a convolution can be oneDNN's, and has work that outweighs its start.

    ``volume`` is its output, or its input where its ``stride`` is given. ``convolutions`` is in how
    many the work is done.
    """
    work = volume.numel() // (volume.shape[1] * prod(stride)) * kernel.numel()
    return work > convolutions * _ONEDNN_START * _SLOW_CONV3D and usable(volume)


def better_mirrored(grad_output: Tensor, kernel: Tensor, input: Tensor, convolutions: int) -> bool:
    """Whether the input's gradient is better computed as ``convolutions`` with parts of the mirrored kernel.

    oneDNN's forward convolution is faster than its gradient, and far so for depthwise layers. And
    PyTorch's own gradient sums up taps in float16, its forward convolution does not. At a stride, taking the
    kernel apart must cost less than writing, and adding up, a gradient of the ``input``'s size.
    """
    if grad_output.dtype == torch.float16 and grad_output.device.type == "cpu":
        return True
    if not worthwhile(grad_output, kernel, convolutions=convolutions):
        return False
    apart = convolutions * _ONEDNN_START + kernel.numel() * kernel.element_size() / _GATHER
    return convolutions == 1 or apart < 3 * input.numel() * input.element_size() / _COPY


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
    total: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.conv3d``, by the fastest kernel at hand; added to ``total`` in place, where given."""
    direct = worthwhile(input, weight, stride)
    if total is not None:
        in_place = direct and all(one.is_contiguous(memory_format=torch.channels_last_3d) for one in (total, input))
        if not in_place:
            return total.add_(conv3d(input, weight, bias, stride, padding, dilation, groups))
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, input, weight, bias, padding, stride, dilation, groups, "add", 1.0, None, [], None
        )
    if not direct:
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    pointwise = prod(weight.shape[2:]) == 1 and groups == 1 and stride == (1, 1, 1) and not any(padding)
    if pointwise and weight.shape[0] > weight.shape[1] and input.is_contiguous():
        # In plain memory a product of matrices, for which the many channels of the result are not reordered.
        matrix = weight.flatten(1).expand(input.shape[0], -1, -1)
        if bias is None:
            product = torch.bmm(matrix, input.flatten(2))
        else:
            product = torch.baddbmm(bias.view(1, -1, 1), matrix, input.flatten(2))
        return torch.ops.aten._unsafe_view(product, (*product.shape[:2], *input.shape[2:]))
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)


def better_channels_last(
    pieces: tuple[Piece, ...], geometry: Geometry, grad_output: Tensor, input_size, for_input: bool, for_weight: bool
) -> bool:
    """Whether gradients in plain memory are worth a conversion of it all to channels-last and back.

    Of plain memory oneDNN makes blocks of channels, and those of both operands are filled up; of
    channels-last memory only those are that its vectors run along.
    """
    channels = input_size[1]
    if geometry.groups > 1 or max(geometry.stride) > 1 or channels < _LANES or not usable(grad_output):
        return False
    saved = 0
    for piece in pieces:
        if not piece.fit.outside:
            blocks = _filled(_filled(1, channels), piece.channels)
            of_input = for_input * (blocks - _filled(piece.channels, channels))
            of_weight = for_weight * (blocks - _fewest_filled(channels, piece.channels))
            saved += prod(piece.extent) * (of_input + of_weight)
    copied = grad_output.numel() + (for_input + for_weight) * prod(input_size)
    return saved * grad_output[:, 0].numel() / _ONEDNN > copied * grad_output.element_size() / _COPY


def better_exchanged(grad: Tensor, input: Tensor, kernel: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a kernel's gradient is better had with input and output's gradient in each other's place.

    ``sum_p g[p, o] x[p + t, c]`` is then the gradient of the mirrored kernel, whose output has the
    input's channels: oneDNN's vectors run along these, of which fewer may be left over. In other memory than
    channels-last it reorders both, and nothing is gained.
    """
    if max(stride) > 1 or grad.stride(1) != 1 or input.stride(1) != 1:
        return False
    channels = input.shape[1] // groups, grad.shape[1] // groups
    if not usable(grad) or _fewest_filled(*channels) == _filled(*channels):
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


def _filled(others: int, along: int) -> int:
    """Products of two runs of channels at a position, where vectors run along the second and are filled up."""
    return others * -(-along // _LANES) * _LANES


def _fewest_filled(in_channels: int, out_channels: int) -> int:
    """:func:`_filled` of a kernel's gradient at stride 1, whose vectors may run along both."""
    return min(_filled(in_channels, out_channels), _filled(out_channels, in_channels))


def by_slices(
    piece: Piece, geometry: Geometry, input: Tensor, grad_output: Tensor, kernel: Tensor, kernel_only: bool
) -> bool:
    """Whether a gradient of a piece is computed on slices: the estimated time of both forms, compared.

    Args:
        input: the piece's channels of the input, fitted (its shape, dtype and strides count).
        grad_output: the piece's channels of the output's gradient.
        kernel: the piece's kernel (its size counts).
        kernel_only: the input's gradient is not asked for.
    """
    if piece.slices.count == 0 or not worthwhile(grad_output, kernel):
        return False
    group_in, group_out = input.shape[1] // piece.groups, piece.channels // piece.groups
    depthwise = group_in == 1 and piece.groups > 1
    taps = prod(piece.extent) * grad_output[:, 0].numel()
    # Vectors run along the channels; those of another group cannot fill them up.
    work = taps * (_filled(1, piece.channels) if depthwise else piece.groups * _filled(group_in, group_out))
    exchanged = kernel_only and max(geometry.stride) == 1 and not depthwise
    fewest = taps * piece.groups * _fewest_filled(group_in, group_out) if exchanged else work
    last = input.is_contiguous(memory_format=torch.channels_last_3d)
    operands = geometry.stride, piece.fit.padding, piece.dilation, piece.groups
    if not _takes_onednn(input, piece.channels, piece.extent, *operands):
        volume = taps * piece.groups * group_in * group_out / _SLOW_CONV3D
    elif depthwise:
        volume = work / _ONEDNN_DEPTHWISE_GRADIENT_OF_VOLUME
    elif exchanged and last and _takes_onednn(grad_output, input.shape[1], piece.extent, *operands):
        volume = fewest / _ONEDNN_GRADIENT_OF_VOLUME
    else:
        volume = work / _ONEDNN_GRADIENT_OF_VOLUME
    slices = fewest / (_ONEDNN_DEPTHWISE_GRADIENT_OF_SLICES if depthwise else _ONEDNN)
    in_place = piece.view == 0 and geometry.stride[0] == 1 and last
    copied = 0 if in_place else input.numel() * input.element_size()
    return slices + copied / _COPY + _ONEDNN_START < volume


def _takes_onednn(input: Tensor, out_channels: int, extent, stride, padding, dilation, groups: int) -> bool:
    """Whether PyTorch's own choice for a convolution is oneDNN."""
    kernel = input.new_empty((out_channels, input.shape[1] // groups, *extent))
    zeros = (0,) * len(extent)
    backend = torch._C._select_conv_backend(input, kernel, None, stride, padding, dilation, False, zeros, groups)
    return backend == torch._C._ConvBackend.Mkldnn
