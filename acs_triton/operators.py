"""ACS, Soft ACS and 2.5D convolution layers: the names, arguments and state-dict keys of ACSConv's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

from . import amp, functional
from .arguments import check_input, check_operands, conv_params
from .frozen import derived
from .geometry import ConvParams, default_split

__all__ = ["ACSConv", "Conv2_5d", "SoftACSConv"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _triple_if_ints(value):
    """ACSConv's attribute form: a triple for an int; pairs (plane axes) and text stay as they are."""
    if isinstance(value, Iterable):
        return value if isinstance(value, str) else tuple(value)
    return (value,) * 3


class _ACSConvNd(nn.Module):
    """What ACS and Soft ACS layers share: parameters, their initial values, checks and padding modes."""

    rule = "acsconv"
    _acs_activation: str | None = None  # set by acs_triton.fuse

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        bias,
        padding_mode,
        aligned,
        device,
        dtype,
    ):
        super().__init__()
        kernel = tuple(kernel_size) if isinstance(kernel_size, Iterable) else (kernel_size,) * 2
        if len(kernel) == 3 and len(set(kernel)) == 1:
            kernel = kernel[:2]
        if len(kernel) != 2 or not all(isinstance(k, int) and k >= 1 for k in kernel):
            raise ValueError(f"kernel_size must be a positive int or a pair (ku, kv), got {kernel_size!r}")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int) or channels < 1:
                raise ValueError(f"{name} must be a positive int, got {channels!r}")
            if not isinstance(groups, int) or groups < 1 or channels % groups:
                raise ValueError(f"groups={groups!r} must be a positive int that divides {name}={channels}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel[:1] * 3 if kernel[0] == kernel[1] else kernel
        self.stride = _triple_if_ints(stride)
        self.padding = _triple_if_ints(padding)
        self.dilation = _triple_if_ints(dilation)
        self.transposed = False
        self.output_padding = (0, 0, 0)
        self.groups = groups
        self.padding_mode = padding_mode
        self.aligned = aligned
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *kernel, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as ``nn.Conv2d`` does (and ACSConv, in the same order)."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in, _ = init._calculate_fan_in_and_fan_out(self.weight)
            bound = 1 / math.sqrt(fan_in)
            init.uniform_(self.bias, -bound, bound)

    def __setattr__(self, name, value) -> None:
        self.__dict__.pop("_resolved", None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_resolved"}

    def _params(self, weight: Tensor, split) -> ConvParams:
        # Kept until an attribute is set. Lists could be changed without that, and Dynamo follows no writes to a module.
        keeps = not torch.compiler.is_compiling()
        if keeps and (found := self.__dict__.get("_resolved")) is not None and found[0] == weight.shape:
            return found[1]
        params = conv_params(
            weight.shape[2:],
            self.out_channels,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            split,
            "aligned" if self.aligned else "acsconv",
            self.padding_mode != "zeros",
        )
        if keeps and list not in map(type, (self.stride, self.padding, self.dilation, split)):
            self.__dict__["_resolved"] = weight.shape, params
        return params

    def _padded(self, input: Tensor, params: ConvParams) -> Tensor:
        if not params.prepadded:
            return input
        low, high = params.carried
        for axis, size, before, after in zip("DHW", input.shape[-3:], low, high, strict=True):
            most = {"reflect": size - 1, "circular": size}.get(self.padding_mode, max(before, after))
            if max(before, after) > most:
                raise ValueError(
                    f"padding={self.padding} with padding_mode={self.padding_mode!r} can be at most {most} along "
                    f"{axis} for the input size {tuple(input.shape[-3:])}"
                )
        pads = (low[2], high[2], low[1], high[1], low[0], high[0])
        return F.pad(input, pads, mode=self.padding_mode) if any(pads) else input

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        defaults = {"padding": (0, 0, 0), "dilation": (1, 1, 1), "groups": 1, "padding_mode": "zeros", "aligned": False}
        parts += [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)


class ACSConv(_ACSConvNd):
    """ACS convolution layer (Yang et al., arXiv:1911.10477): 2D weights, 3D input and output.

    Args:
        in_channels, out_channels: channels; multiples of ``groups``.
        kernel_size: int, or ``(ku, kv)`` on the plane axes.
        stride, padding, dilation, groups: as in :func:`acs_triton.functional.acs_conv3d`.
        acs_kernel_split: output channels ``(axial, coronal, sagittal)``; a third each by default.
        bias: learn a bias.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``. All views are padded
            so, on all axes. (ACSConv accepts the first three and pads with zeros.)
        aligned: see :func:`acs_triton.functional.acs_conv3d`.
        device, dtype: of the parameters.

    Shape: ``(N, in_channels, D, H, W)`` or unbatched, to ``(N, out_channels, D', H', W')``.

    Attributes:
        weight: ``(out_channels, in_channels / groups, ku, kv)``.
        bias: ``(out_channels,)`` or None.

    >>> layer = ACSConv(3, 10, kernel_size=3, padding=1)
    >>> layer(torch.rand(2, 3, 8, 16, 16)).shape
    torch.Size([2, 10, 8, 16, 16])
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        acs_kernel_split=None,
        bias=True,
        padding_mode="zeros",
        aligned=False,
        device=None,
        dtype=None,
    ):
        convolution = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(*convolution, bias, padding_mode, aligned, device, dtype)
        self.acs_kernel_split = default_split(out_channels) if acs_kernel_split is None else tuple(acs_kernel_split)
        self._params(self.weight, self.acs_kernel_split)

    def forward(self, input: Tensor) -> Tensor:
        input, weight, bias = amp.cast(input, self.weight, self.bias)
        check_operands(input, weight, bias, self.groups)
        params = self._params(weight, self.acs_kernel_split)
        return functional.apply(self._padded(input, params), weight, bias, params, self._acs_activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, acs_kernel_split={self.acs_kernel_split}"


class SoftACSConv(_ACSConvNd):
    """Soft ACS convolution layer: every channel in all three views, mixed by learnt weights.

    Args:
        mean: mix with 1/3 each instead, without parameters (mean ACS).

    The other arguments and the shapes are those of :class:`ACSConv`.

    Attributes:
        soft_w_core: ``(out_channels, 3)``; its softmax over the views is the mix. Absent with ``mean``.

    >>> layer = SoftACSConv(3, 10, kernel_size=3, padding=1)
    >>> layer(torch.rand(2, 3, 8, 16, 16)).shape, layer.view_weight.shape
    (torch.Size([2, 10, 8, 16, 16]), torch.Size([10, 3]))
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        mean=False,
        bias=True,
        padding_mode="zeros",
        aligned=False,
        device=None,
        dtype=None,
    ):
        convolution = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(*convolution, bias, padding_mode, aligned, device, dtype)
        self.mean = mean
        if not mean:
            self.soft_w_core = nn.Parameter(torch.rand(out_channels, 3, device=device, dtype=dtype))
        self._params(self.weight, None)

    @property
    def view_weight(self) -> Tensor:
        """The mix ``(out_channels, 3)`` of the axial, coronal and sagittal views; rows sum to 1."""
        if self.mean:
            return derived(self.weight, "mean", lambda weight: weight.new_full((self.out_channels, 3), 1 / 3))
        return derived(self.soft_w_core, "softmax", lambda core: core.softmax(-1))

    def forward(self, input: Tensor) -> Tensor:
        input, weight, view_weight, bias = amp.cast(input, self.weight, self.view_weight, self.bias)
        check_operands(input, weight, bias, self.groups)
        params = self._params(weight, None)
        data = self._padded(input, params)
        return functional.apply_soft(data, weight, view_weight, bias, params, self._acs_activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mean={self.mean}"


class Conv2_5d(nn.Conv3d):
    """2.5D convolution layer: a ``(1, k, k)`` kernel, or ``(k, 1, k)``, ``(k, k, 1)`` for other axes.

    Args:
        kernel_size: int, or a pair on the plane axes.
        stride: int (all three axes, as in ACSConv) or ``(D, H, W)``.
        padding: int or pair on the plane axes, ``"same"`` or ``"valid"``.
        dilation, groups, bias: as in ``nn.Conv3d``.
        padding_mode: as in ``nn.Conv3d``; None means zeros. (ACSConv ignores it.)
        unsqueeze_axis: the axis without a kernel: -3 (D), -2 (H) or -1 (W).

    The weight is 5-D, as in ACSConv: ``(O, C / groups, 1, k, k)`` for the default axis.

    >>> layer = Conv2_5d(3, 10, kernel_size=3, padding=1)
    >>> layer(torch.rand(2, 3, 8, 16, 16)).shape, layer.weight.shape
    (torch.Size([2, 10, 8, 16, 16]), torch.Size([10, 3, 1, 3, 3]))
    """

    _acs_activation: str | None = None  # set by acs_triton.fuse

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode=None,
        unsqueeze_axis=-3,
        device=None,
        dtype=None,
    ):
        if unsqueeze_axis not in (-3, -2, -1):
            raise ValueError(f"unsqueeze_axis must be -3 (D), -2 (H) or -1 (W), got {unsqueeze_axis!r}")
        super().__init__(
            in_channels,
            out_channels,
            _with_axis("kernel_size", kernel_size, unsqueeze_axis, 1),
            stride,
            padding if isinstance(padding, str) else _with_axis("padding", padding, unsqueeze_axis, 0),
            dilation,
            groups,
            bias,
            padding_mode or "zeros",
            device,
            dtype,
        )
        self.unsqueeze_axis = unsqueeze_axis

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        check_input(input)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        plane = derived(weight, "plane", lambda weight: weight.squeeze(self.unsqueeze_axis))
        return functional.conv2_5d(
            input,
            plane,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.unsqueeze_axis,
            self._acs_activation,
        )


def _with_axis(name: str, value, axis: int, fill: int) -> tuple[int, int, int]:
    pair = list(value) if isinstance(value, Iterable) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair on the plane axes, got {value!r}")
    pair.insert(axis + 3, fill)
    return tuple(pair)
