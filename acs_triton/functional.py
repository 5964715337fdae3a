"""ACS convolutions as functions: check the arguments, then call the differentiable primitives."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import amp, autograd, standard
from .activations import activate
from .arguments import check_activation, check_operands, check_view_weight, checked_params, planar_params
from .backends import cpu_cost
from .frozen import FrozenParameter, is_frozen, once
from .geometry import ConvParams

__all__ = ["acs_conv3d", "conv2_5d", "soft_acs_conv3d"]


def acs_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    split=None,
    aligned: bool = False,
    activation: str | None = None,
) -> Tensor:
    """ACS convolution (Yang et al., arXiv:1911.10477, section 3.1): a 2D kernel on a volume.

    The output channels are split into three contiguous views. Axial channels apply their 2D
    kernel as ``(1, ku, kv)``, coronal ones as ``(ku, 1, kv)``, sagittal ones as ``(ku, kv, 1)``.

    Args:
        input: ``(N, C, D, H, W)`` or unbatched ``(C, D, H, W)``; float64, float32, bfloat16 or float16.
        weight: ``(O, C / groups, ku, kv)``, of the input's dtype and device.
        bias: ``(O,)`` or None.
        stride: int or ``(D, H, W)``, in voxels.
        padding: zeros added to each side: int, plane pair ``(u, v)``, triple ``(D, H, W)``, ``"same"`` or ``"valid"``.
        dilation: int, plane pair ``(u, v)`` or triple ``(D, H, W)``.
        groups: any divisor of ``C`` and ``O``.
        split: output channels ``(axial, coronal, sagittal)``, summing to ``O``; by default a third
            each, the remainder to axial first.
        aligned: place the through-plane sample on the kernel's centre,
            ``dilation * (k // 2) - padding``, instead of where ACSConv 0.1.1 places it. The two
            differ for even kernels, dilation, and some sizes.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``, applied to the result; in the
            Triton kernels before it is stored, where no gradient is needed.

    Returns:
        ``(N, O, D', H', W')`` (or unbatched), sized as by ``torch.nn.functional.conv3d`` with a
        ``(k, k, k)`` kernel, channels-last where the input is.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and what would be right.

    >>> volume, weight = torch.rand(2, 3, 8, 16, 16), torch.rand(10, 3, 3, 3)
    >>> acs_conv3d(volume, weight, padding=1, stride=2).shape
    torch.Size([2, 10, 4, 8, 8])
    """
    input, weight, bias = amp.cast(input, weight, bias)
    params = checked_params(input, weight, bias, stride, padding, dilation, groups, split, aligned)
    check_activation(activation)
    return apply(input, weight, bias, params, activation)


def soft_acs_conv3d(
    input: Tensor,
    weight: Tensor,
    view_weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    aligned: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Soft ACS convolution (Yang et al., section 3.3): every channel in all three views, mixed.

    Args:
        view_weight: ``(O, 3)``, the share of the axial, coronal and sagittal view in each output
            channel, used as given (``SoftACSConv`` passes a softmax; 1/3 each is mean ACS).

    The other arguments, the result and the errors are those of :func:`acs_conv3d`.

    >>> volume, weight, shares = torch.rand(1, 3, 8, 16, 16), torch.rand(10, 3, 3, 3), torch.full((10, 3), 1 / 3)
    >>> soft_acs_conv3d(volume, weight, shares, padding=1).shape
    torch.Size([1, 10, 8, 16, 16])
    """
    input, weight, view_weight, bias = amp.cast(input, weight, view_weight, bias)
    params = checked_params(input, weight, bias, stride, padding, dilation, groups, aligned=aligned)
    check_view_weight(view_weight, input, weight.shape[0])
    check_activation(activation)
    return apply_soft(input, weight, view_weight, bias, params, activation)


def conv2_5d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    axis: int = -3,
    activation: str | None = None,
) -> Tensor:
    """2.5D convolution: a 2D kernel on every slice, ``(1, ku, kv)`` for the default axis.

    Args:
        weight: ``(O, C / groups, ku, kv)``.
        stride: int (all three axes, as ACSConv's ``Conv2_5d``), plane pair or ``(D, H, W)``.
        padding, dilation: int or plane pair (the plane axes only) or ``(D, H, W)``; padding also
            ``"same"`` or ``"valid"``.
        axis: the axis without a kernel: -3 (D), -2 (H) or -1 (W).

    The other arguments, the result and the errors are those of :func:`acs_conv3d`; the size is
    that of ``conv3d`` with the ``(1, ku, kv)`` kernel.

    >>> conv2_5d(torch.rand(1, 3, 8, 16, 16), torch.rand(10, 3, 3, 3)).shape
    torch.Size([1, 10, 8, 14, 14])
    """
    input, weight, bias = amp.cast(input, weight, bias)
    check_operands(input, weight, bias, groups)
    if axis not in (-3, -2, -1):
        raise ValueError(f"axis must be -3 (D), -2 (H) or -1 (W), got {axis!r}")
    params = planar_params(weight.shape[2:], weight.shape[0], stride, padding, dilation, groups, axis + 3)
    check_activation(activation)
    return apply(input, weight, bias, params, activation)


def apply(
    input: Tensor, weight: Tensor, bias: Tensor | None, params: ConvParams, activation: str | None = None
) -> Tensor:
    """The convolution of checked operands, batched or not."""
    if input.dim() == 4:
        return apply(input.unsqueeze(0), weight, bias, params, activation).squeeze(0)
    if standard.wanted():
        return activate(standard.conv(input, weight, bias, params), activation)
    return autograd.conv(input, weight, bias, params, activation)


def apply_soft(
    input: Tensor,
    weight: Tensor,
    view_weight: Tensor,
    bias: Tensor | None,
    params: ConvParams,
    activation: str | None = None,
) -> Tensor:
    """The mixed convolution of checked operands; the split of ``params`` is ignored."""
    if input.dim() == 4:
        return apply_soft(input.unsqueeze(0), weight, view_weight, bias, params, activation).squeeze(0)
    kernels = _mixed(weight, view_weight)
    whole = soft_params(params, input.shape[2:])
    if whole is not None:
        return apply(input, kernels.sum(2) if whole.split else kernels, bias, whole, activation)
    parts = []
    for view, kernel in enumerate(kernels.unbind(2)):
        data, one_view = input, params.one_view(view, weight.shape[0])
        if params.repeats_one_plane(input.shape[2:], view):
            length = (params.output_size(input.shape[2:])[view] - 1) * params.stride[view] + 1
            sizes = [length if axis == view + 2 else -1 for axis in range(5)]
            data, one_view = input.narrow(view + 2, 0, 1).expand(sizes), one_view.without_through_plane(view)
        parts.append(apply(data, kernel, None if parts else bias, one_view))
    return activate(sum(parts[1:], start=parts[0]), activation)


def pointwise(images: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The 1x1 convolution of images ``(N, C, H, W)`` with a weight ``(O, C / groups, 1, 1)``, the faster way."""
    fits = groups == 1 and images.shape[1] == weight.shape[1]
    if not fits or not autograd.unwatched(images, weight, bias) or not cpu_cost.as_matrices(images, weight):
        return F.conv2d(images, weight, bias, 1, 0, 1, groups)
    return F.linear(images.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def soft_params(params: ConvParams, input_size) -> ConvParams | None:
    """Parameters of the one convolution that the mixed one is; None where it is a sum of three.

    All views of a pointwise kernel coincide: theirs is the standard one, of the summed kernels.
    """
    if params.kernel_size == (1, 1) and not any(params.padding_low):
        return params
    if standard.wanted() or any(params.repeats_one_plane(input_size, view) for view in range(3)):
        return None
    return params.mixed()


def _mixed(weight: Tensor, view_weight: Tensor) -> Tensor:
    """The weight of mixed views, ``(O, C / groups, 3, ku, kv)``."""

    def mix(weight, view_weight):
        return weight.unsqueeze(2) * view_weight[:, None, :, None, None]

    if not is_frozen(weight, view_weight):
        return mix(weight, view_weight)
    return once(weight, view_weight, lambda: FrozenParameter(mix(weight, view_weight), requires_grad=False))
