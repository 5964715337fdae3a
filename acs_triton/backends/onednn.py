"""Forward convolutions on a CPU, handed to oneDNN where they are worth its start.

PyTorch decides convolution by convolution whether oneDNN or its own ``slow_conv3d`` computes it,
by a rule made for 2D: a single volume with fewer than about 20,000 elements in ``C * D * H`` is
thought small, however large its kernel or its width.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

START = 40
"""Microseconds that a call of oneDNN takes at least."""

SLOW_CONV3D = 15_000
"""Multiply-adds a microsecond of PyTorch's own convolution, on the machine of :mod:`.cpu_cost`."""

WORTHWHILE = START * SLOW_CONV3D
"""Multiply-adds that outweigh oneDNN's start."""


def usable(tensor: Tensor) -> bool:
    """Whether oneDNN can compute a convolution of this tensor."""
    if tensor.device.type != "cpu" or tensor.numel() == 0 or not _enabled():
        return False
    if tensor.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tensor.dtype == torch.float32


def _enabled() -> bool:
    return torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()


def worthwhile(volume: Tensor, kernel: Tensor, stride=(1, 1, 1)) -> bool:
    """Whether a convolution can be oneDNN's, and has work that outweighs its start.

    ``volume`` is its output, or its input where its ``stride`` is given.
    """
    work = volume.numel() // (volume.shape[1] * prod(stride)) * kernel.numel()
    return work > WORTHWHILE and usable(volume)


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
