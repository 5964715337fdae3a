"""Checks and normal forms of what users pass: one place for the wording of every error."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, wraps
from numbers import Integral

import torch

from .activations import ACTIVATIONS
from .geometry import PLANE_AXES, ROLES, VIEWS, ConvParams, default_split, per_axis

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _as_ints(name: str, value, lengths: tuple[int, ...], least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not all(isinstance(one, Integral) and not isinstance(one, bool) for one in values):
        raise TypeError(f"{name} must be an int or a tuple of ints, got {value!r}")
    if len(values) not in lengths:
        wanted = " or ".join(str(n) for n in lengths)
        raise ValueError(f"{name} must have {wanted} entries, got {len(values)} in {value!r}")
    if any(one < least for one in values):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return tuple(int(one) for one in values)


def _cached(function):
    """Remember results by arguments. Dynamo, which cannot use a cache, and unhashable arguments go past it."""
    remembered = lru_cache(maxsize=4096, typed=True)(function)

    @wraps(function)
    def wrapper(*args):
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return remembered(*args)
        except TypeError:
            return function(*args)

    return wrapper


def _hashable(value):
    return tuple(value) if isinstance(value, (list, torch.Size)) else value


def _per_role(name: str, value, least: int) -> tuple[int, ...]:
    values = _as_ints(name, value, (1, 2, 3), least)
    return values * ROLES if len(values) == 1 else per_axis(values)


def _stride(value) -> tuple[int, int, int]:
    values = _as_ints("stride", value, (1, 2, 3), 1)
    if len(values) == 3:
        return values
    if len(set(values)) > 1:
        raise ValueError(
            f"stride={value!r}: a plane pair with different entries would sample H at two different steps in the axial "
            f"and sagittal views; give one int or a (D, H, W) triple"
        )
    return (values[0],) * 3


def _padding_by_name(value: str, kernels, dilation, stride) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``(low, high)`` per role, for the kernel size and dilation of each role."""
    if value == "valid":
        return (0,) * ROLES, (0,) * ROLES
    if value != "same":
        raise ValueError(f"padding must be ints, 'same' or 'valid', got {value!r}")
    if stride != (1, 1, 1):
        raise ValueError(f"padding='same' needs stride 1, got stride={stride}; give the padding as ints")
    totals = tuple(d * (k - 1) for d, k in zip(dilation, kernels, strict=True))
    low = tuple(total // 2 for total in totals)
    return low, tuple(total - one for total, one in zip(totals, low, strict=True))


def _split(value, out_channels: int) -> tuple[int, int, int]:
    if value is None:
        return default_split(out_channels)
    split = _as_ints("split", value, (3,), 0)
    if sum(split) != out_channels:
        raise ValueError(
            f"split={split} sums to {sum(split)}; the three counts must sum to the {out_channels} output channels"
        )
    return split


def conv_params(
    kernel_size, out_channels, stride, padding, dilation, groups, split, rule="acsconv", prepadded=False
) -> ConvParams:
    """Arguments of the public functions and modules as :class:`ConvParams`.

    Raises:
        TypeError, ValueError: an argument is not of the documented form; the message names it.
    """
    return _conv_params(
        tuple(kernel_size),
        out_channels,
        _hashable(stride),
        _hashable(padding),
        _hashable(dilation),
        groups,
        _hashable(split),
        rule,
        prepadded,
    )


@_cached
def _conv_params(kernel_size, out_channels, stride, padding, dilation, groups, split, rule, prepadded) -> ConvParams:
    stride = _stride(stride)
    dilation = _per_role("dilation", dilation, 1)
    if isinstance(padding, str):
        low, high = _padding_by_name(padding, per_axis(kernel_size), dilation, stride)
    else:
        low = high = _per_role("padding", padding, 0)
    return ConvParams(
        kernel_size=kernel_size,
        stride=stride,
        padding_low=low,
        padding_high=high,
        dilation=dilation,
        groups=_as_ints("groups", groups, (1,), 1)[0],
        split=_split(split, out_channels),
        rule=rule,
        prepadded=prepadded,
    )


def planar_params(kernel_size, out_channels, stride, padding, dilation, groups, view: int) -> ConvParams:
    """:class:`ConvParams` of a 2.5D convolution: one view, a kernel of size 1 of its own through the plane.

    An int or pair of ``padding`` and ``dilation`` is for the plane axes, as in ACSConv's
    ``Conv2_5d``; an int ``stride`` is for all three axes, a pair for the plane axes alone.
    """
    return _planar_params(
        tuple(kernel_size), out_channels, _hashable(stride), _hashable(padding), _hashable(dilation), groups, view
    )


def _in_plane(values: tuple[int, ...], view: int, through: int) -> tuple[int, ...]:
    if len(values) == 3:
        return values
    triple = [through] * 3
    for axis, value in zip(PLANE_AXES[view], values if len(values) == 2 else values * 2, strict=True):
        triple[axis] = value
    return tuple(triple)


@_cached
def _planar_params(kernel_size, out_channels, stride, padding, dilation, groups, view) -> ConvParams:
    split = tuple(out_channels if v == view else 0 for v in range(3))
    strides = _as_ints("stride", stride, (1, 2, 3), 1)
    strides = strides * 3 if len(strides) == 1 else _in_plane(strides, view, through=1)
    dilations = per_axis(_in_plane(_as_ints("dilation", dilation, (1, 2, 3), 1), view, through=1))
    if isinstance(padding, str):
        kernels = per_axis(_in_plane(kernel_size, view, through=1))
        low, high = _padding_by_name(padding, kernels, dilations, strides)
    else:
        low = high = per_axis(_in_plane(_as_ints("padding", padding, (1, 2, 3), 0), view, through=0))
    groups = _as_ints("groups", groups, (1,), 1)[0]
    return ConvParams(kernel_size, strides, low, high, dilations, groups, split, rule="planar")


def check_input(input) -> None:
    """Raise unless ``input`` is a ``(N, C, D, H, W)`` or ``(C, D, H, W)`` tensor of a supported dtype."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    if input.dim() not in (4, 5):
        raise ValueError(
            f"input must have the shape (N, C, D, H, W) or (C, D, H, W), got {input.dim()} axes: {tuple(input.shape)}"
        )
    if input.dtype not in FLOAT_DTYPES:
        raise TypeError(f"input has dtype {input.dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}")


def check_activation(name) -> None:
    """Raise unless ``name`` is None or names an activation."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"activation must be None or one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")


_MOST_KEPT = 4096
_passed: set[tuple] = set()
"""What was checked of operands that passed: a layer's second call checks nothing again."""


def check_operands(input, weight, bias, groups: int) -> None:
    """Raise unless weight and bias fit each other and the input: shapes, dtype, device."""
    if torch.compiler.is_compiling():
        _check_operands(input, weight, bias, groups)
        return
    try:
        of_bias = None if bias is None else (type(bias), bias.shape, bias.dtype, bias.device)
        key = type(input), input.shape, input.dtype, input.device, type(weight), weight.shape, weight.dtype
        key += weight.device, of_bias, type(groups), groups
        if key in _passed:
            return
    except (AttributeError, TypeError):  # no tensors, or sizes that are not known
        key = None
    _check_operands(input, weight, bias, groups)
    if key is not None and len(_passed) < _MOST_KEPT:
        _passed.add(key)


def _check_operands(input, weight, bias, groups: int) -> None:
    check_input(input)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dim() != 4:
        raise ValueError(
            f"weight must have the 2D shape (out_channels, in_channels / groups, ku, kv), got {tuple(weight.shape)}"
        )
    out_channels, group_channels = weight.shape[:2]
    if not isinstance(groups, Integral) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or out_channels < 1 or out_channels % groups:
        raise ValueError(f"groups={groups} must divide the {out_channels} output channels of weight")
    channels = input.shape[-4]
    if channels != group_channels * groups:
        raise ValueError(
            f"input has {channels} channels, but weight {tuple(weight.shape)} with groups={groups} needs "
            f"{group_channels * groups}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    tensors = [("weight", weight)]
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"bias must be a torch.Tensor or None, got {type(bias).__name__}")
        if bias.shape != (out_channels,):
            raise ValueError(f"bias must have the shape ({out_channels},), got {tuple(bias.shape)}")
        tensors.append(("bias", bias))
    check_matches_input(input, tensors)


def checked_params(input, weight, bias, stride, padding, dilation, groups, split=None, aligned=False) -> ConvParams:
    """The parameters of an ACS convolution, once operands and arguments have passed their checks."""
    check_operands(input, weight, bias, groups)
    rule = "aligned" if aligned else "acsconv"
    return conv_params(weight.shape[2:], weight.shape[0], stride, padding, dilation, groups, split, rule)


def check_matches_input(input, tensors) -> None:
    """Raise unless the named tensors have the input's dtype and device."""
    for name, tensor in tensors:
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, input has {input.dtype}; convert one of them")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {input.device}; move one of them")


def check_view_weight(view_weight, input, out_channels: int) -> None:
    """Raise unless ``view_weight`` is an ``(out_channels, 3)`` tensor like the input."""
    if not isinstance(view_weight, torch.Tensor):
        raise TypeError(f"view_weight must be a torch.Tensor, got {type(view_weight).__name__}")
    if view_weight.shape != (out_channels, len(VIEWS)):
        raise ValueError(
            f"view_weight must have the shape ({out_channels}, 3), one column a view, got {tuple(view_weight.shape)}"
        )
    check_matches_input(input, [("view_weight", view_weight)])
