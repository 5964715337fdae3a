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


def by_slices(piece: Piece, geometry: Geometry, input: Tensor, grad_output: Tensor, kernel: Tensor) -> bool:
    """Whether a gradient of a piece is computed on slices: the estimated time of both forms, compared.

    Args:
        input: the piece's channels of the input, fitted (its shape, dtype and strides count).
        grad_output: the piece's channels of the output's gradient.
        kernel: the piece's kernel (its size counts).
    """
    if piece.slices.count == 0 or not worthwhile(grad_output, kernel):
        return False
    group_channels = input.shape[1] // piece.groups
    depthwise = group_channels == 1 and piece.groups > 1
    taps, positions = prod(piece.extent), grad_output[:, 0].numel()
    # Vectors run along the channels; those of another group cannot fill them up.
    lanes = piece.channels if depthwise else piece.groups * _round_up(piece.channels // piece.groups)
    work = positions * taps * group_channels * _round_up(lanes)
    if not _takes_onednn(input, piece, geometry):
        volume = positions * taps * group_channels * piece.channels / _SLOW_CONV3D
    elif depthwise:
        volume = work / _ONEDNN_DEPTHWISE_GRADIENT_OF_VOLUME
    else:
        volume = work / _ONEDNN_GRADIENT_OF_VOLUME
    slices = work / (_ONEDNN_DEPTHWISE_GRADIENT_OF_SLICES if depthwise else _ONEDNN)
    in_place = piece.view == 0 and geometry.stride[0] == 1 and input.is_contiguous(memory_format=torch.channels_last_3d)
    copied = 0 if in_place else input.numel() * input.element_size()
    return slices + copied / _COPY + _ONEDNN_START < volume


def _round_up(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


def _takes_onednn(input: Tensor, piece: Piece, geometry: Geometry) -> bool:
    kernel = input.new_empty((piece.channels, input.shape[1] // piece.groups, *piece.extent))
    backend = torch._C._select_conv_backend(
        input, kernel, None, geometry.stride, piece.fit.padding, piece.dilation, False, (0, 0, 0), piece.groups
    )
    return backend == torch._C._ConvBackend.Mkldnn
