"""A convolution by its definition, in float64 on the CPU, and what a kernel's result may differ from it."""

import itertools
import math

import torch

from acs_triton.geometry import PLANE_AXES


def conv(input, weight, bias, geometry):
    """Sum over taps of gathered positions: output ``i``, tap ``t`` reads ``i * stride + start + t * dilation``."""
    input, weight = input.cpu().double(), weight.cpu().double()
    if geometry.mixed:
        bias = weight.new_zeros(len(weight)) if bias is None else bias.cpu().double()
        views = (conv(input, weight[:, :, v], None, geometry.one_view(v, len(weight))) for v in range(3))
        return sum(views) + bias.view(1, -1, 1, 1, 1)
    channels_out, channels_in = weight.shape[0], input.shape[1]
    group_in, group_out = channels_in // geometry.groups, channels_out // geometry.groups
    output = input.new_zeros(input.shape[0], channels_out, *geometry.output_size)
    for view, first, end in geometry.views:
        for tu, tv in itertools.product(*map(range, geometry.kernel_size)):
            taps = dict(zip(PLANE_AXES[view], (tu, tv), strict=True))
            sampled = input
            for axis in range(3):
                position = torch.arange(geometry.output_size[axis]) * geometry.stride[axis]
                position += geometry.start[view][axis] + taps.get(axis, 0) * geometry.dilation[view][axis]
                inside = (position >= 0) & (position < geometry.input_size[axis])
                sampled = sampled.index_select(axis + 2, position.clamp(0, geometry.input_size[axis] - 1))
                shape = [1] * 5
                shape[axis + 2] = -1
                sampled = sampled * inside.view(shape)
            dense = weight.new_zeros(channels_out, channels_in)
            for o in range(first, end):
                group = o // group_out
                dense = dense.index_put(
                    (torch.tensor(o), torch.arange(group * group_in, (group + 1) * group_in)), weight[o, :, tu, tv]
                )
            output[:, first:end] += torch.einsum("oc,ncdhw->nodhw", dense[first:end], sampled)
    if bias is not None:
        output += bias.cpu().double().view(1, -1, 1, 1, 1)
    return output


def input_grad(grad_output, weight, geometry):
    shape = (grad_output.shape[0], weight.shape[1] * geometry.groups, *geometry.input_size)
    input = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    output = conv(input, weight, None, geometry)
    return torch.autograd.grad(output, input, grad_output.cpu().double())[0]


def weight_grad(grad_output, input, geometry):
    views = (3,) if geometry.mixed else ()
    shape = (grad_output.shape[1], input.shape[1] // geometry.groups, *views, *geometry.kernel_size)
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    output = conv(input, weight, None, geometry)
    return torch.autograd.grad(output, weight, grad_output.cpu().double())[0]


def absolute(tensor):
    return None if tensor is None else tensor.abs()


RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 4e-3, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative error of a whole result, in the Euclidean norm."""


def check(result, expected, magnitude, terms, exact=False, merged=False):
    """Assert that a kernel's result is the oracle's.

    Per element, the error is at most that of rounding the result once, plus that of summing
    ``terms`` products in the accumulator, which grows with the square root of their number.

    Args:
        result: from the kernel.
        expected: from the oracle, float64.
        magnitude: the oracle's result for the operands' absolute values.
        terms: number of products in a sum.
        exact: whether float32 operands were not rounded to tf32.
        merged: whether an operand is a sum of up to three that was rounded to the result's dtype.
    """
    assert result.shape == expected.shape
    dtype, result = result.dtype, result.detach().cpu().double()
    assert not result.isnan().any(), f"{int(result.isnan().sum())} of {result.numel()} elements are NaN"
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    per_product = 2.0**-9 if dtype == torch.float32 and not exact else 0.0
    per_product += torch.finfo(dtype).eps if merged else 0.0
    per_sum = 4 * math.sqrt(terms) * torch.finfo(accumulator).eps
    allowed = torch.finfo(dtype).eps * expected.abs() + (per_product + per_sum) * magnitude
    allowed += torch.finfo(dtype).smallest_normal
    excess = (result - expected).abs() - allowed
    worst = int(excess.argmax()) if excess.numel() else 0
    assert not (excess > 0).any(), (
        f"{int((excess > 0).sum())} of {excess.numel()} elements differ; the worst is {result.flatten()[worst]:g} "
        f"instead of {expected.flatten()[worst]:g}, allowed {allowed.flatten()[worst]:g}"
    )
    assert (result - expected).norm() <= RELATIVE_ERROR[dtype] * expected.norm()
