"""The three primitives as registered operators, with fakes and batching rules.

====================================== =============================== ===========================
``torch.ops.acs_triton``               result                          shape
====================================== =============================== ===========================
``conv(input, weight, bias, ...)``     the convolution                 ``(N, O, *output_size)``
``conv_act(..., activation, ...)``     an activation of it             ``(N, O, *output_size)``
``input_grad(grad, weight, ...)``      its derivative for the input    ``(N, C, *input_size)``
``weight_grad(grad, input, ...)``      its derivative for the weight   ``(O, C/groups, ku, kv)``
``gradients(grad, input, weight,...)`` both, not differentiable        the two above
====================================== =============================== ===========================

Their further arguments are the fields of :class:`acs_triton.geometry.ConvParams`. With an empty
``split`` the views are mixed: every output channel is the sum of all three (Soft ACS), and the weight
has the shape ``(O, C/groups, 3, ku, kv)``. Offsets that
depend on the input's size are resolved inside the operators, so a graph that is compiled or
exported with dynamic sizes needs no guard on them. Autocast does not reach into an operator: its
fake promises the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import amp, backends
from .geometry import VIEWS, ConvParams
from .layout import memory_format

_PARAMS = (
    "int[] kernel_size, int[] stride, int[] padding_low, int[] padding_high, int[] dilation, "
    "int groups, int[] split, str rule, bool prepadded"
)
FIELDS = _PARAMS.count(",") + 1
"""Of the parameters, the last arguments of every operator."""

LIBRARY = torch.library.Library("acs_triton", "DEF")
LIBRARY.define(f"conv(Tensor input, Tensor weight, Tensor? bias, {_PARAMS}) -> Tensor")
LIBRARY.define(f"conv_act(Tensor input, Tensor weight, Tensor? bias, str activation, {_PARAMS}) -> Tensor")
LIBRARY.define(f"input_grad(Tensor grad_output, Tensor weight, SymInt[] input_size, {_PARAMS}) -> Tensor")
LIBRARY.define(f"weight_grad(Tensor grad_output, Tensor input, {_PARAMS}) -> Tensor")
LIBRARY.define(f"gradients(Tensor grad_output, Tensor input, Tensor weight, {_PARAMS}) -> (Tensor, Tensor)")

conv = torch.ops.acs_triton.conv.default
conv_act = torch.ops.acs_triton.conv_act.default
input_grad = torch.ops.acs_triton.input_grad.default
weight_grad = torch.ops.acs_triton.weight_grad.default
gradients = torch.ops.acs_triton.gradients.default


# The operators' implementations, which may be called at once where nothing else is to see the call.


def run_conv(input: Tensor, weight: Tensor, bias: Tensor | None, params: ConvParams) -> Tensor:
    geometry = params.geometry(input.shape[2:])
    backend = backends.choose("conv", input, weight, geometry)
    with amp.off(input):
        return backend.conv(input, weight, bias, geometry)


def run_conv_act(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, params: ConvParams) -> Tensor:
    geometry = params.geometry(input.shape[2:])
    backend = backends.choose("conv", input, weight, geometry)
    with amp.off(input):
        return backend.conv_act(input, weight, bias, activation, geometry)


def run_input_grad(grad_output: Tensor, weight: Tensor, input_size, params: ConvParams) -> Tensor:
    geometry = params.geometry(input_size)
    backend = backends.choose("input_grad", grad_output, weight, geometry)
    with amp.off(grad_output):
        return backend.input_grad(grad_output, weight, geometry)


def run_weight_grad(grad_output: Tensor, input: Tensor, params: ConvParams) -> Tensor:
    geometry = params.geometry(input.shape[2:])
    backend = backends.choose("weight_grad", grad_output, input, geometry)
    with amp.off(input):
        return backend.weight_grad(grad_output, input, geometry)


def run_gradients(grad_output: Tensor, input: Tensor, weight: Tensor, params: ConvParams) -> tuple[Tensor, Tensor]:
    geometry = params.geometry(input.shape[2:])
    for_input = backends.choose("input_grad", grad_output, weight, geometry)
    for_weight = backends.choose("weight_grad", grad_output, input, geometry)
    with amp.off(input):
        if for_input is for_weight:
            return for_input.gradients(grad_output, input, weight, geometry)
        return for_input.input_grad(grad_output, weight, geometry), for_weight.weight_grad(grad_output, input, geometry)


def _implementation(run: Callable) -> Callable:
    """``run`` as the dispatcher calls it: with the parameters' fields as the last arguments."""
    return lambda *args: run(*args[:-FIELDS], ConvParams.from_args(args[-FIELDS:]))


for _op, _run in (
    (conv, run_conv),
    (conv_act, run_conv_act),
    (input_grad, run_input_grad),
    (weight_grad, run_weight_grad),
    (gradients, run_gradients),
):
    LIBRARY.impl(_op, _implementation(_run), "CompositeExplicitAutograd")


@torch.library.register_fake("acs_triton::conv", lib=LIBRARY)
def _conv_fake(input, weight, bias, *params):
    size = ConvParams.from_args(params).output_size(input.shape[2:])
    shape = (input.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


@torch.library.register_fake("acs_triton::conv_act", lib=LIBRARY)
def _conv_act_fake(input, weight, bias, activation, *params):
    return _conv_fake(input, weight, bias, *params)


@torch.library.register_fake("acs_triton::input_grad", lib=LIBRARY)
def _input_grad_fake(grad_output, weight, input_size, *params):
    shape = (grad_output.shape[0], weight.shape[1] * ConvParams.from_args(params).groups, *input_size)
    return torch.empty(
        shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(grad_output)
    )


@torch.library.register_fake("acs_triton::weight_grad", lib=LIBRARY)
def _weight_grad_fake(grad_output, input, *params):
    params = ConvParams.from_args(params)
    views = () if params.split else (len(VIEWS),)
    return grad_output.new_empty((grad_output.shape[1], input.shape[1] // params.groups, *views, *params.kernel_size))


@torch.library.register_fake("acs_triton::gradients", lib=LIBRARY)
def _gradients_fake(grad_output, input, weight, *params):
    return (
        _input_grad_fake(grad_output, weight, input.shape[2:], *params),
        _weight_grad_fake(grad_output, input, *params),
    )


def _batching_rule(op, folds):
    """vmap over an operator: fold the mapped axis into the batch if only ``folds`` operands have it, else loop.

    The weight cannot be folded: the split into views is contiguous, so a batch of weights is not
    one grouped convolution.
    """

    def rule(info, in_dims, *args):
        batched = [i for i, dim in enumerate(in_dims) if isinstance(dim, int)]
        moved = [arg.movedim(dim, 0) if isinstance(dim, int) else arg for arg, dim in zip(args, in_dims, strict=True)]
        if set(batched) <= set(folds):
            result = op(*[arg.flatten(0, 1) if i in batched else arg for i, arg in enumerate(moved)])
            return result.unflatten(0, (info.batch_size, -1)), 0
        rows = (
            op(*[arg[row] if i in batched else arg for i, arg in enumerate(moved)]) for row in range(info.batch_size)
        )
        return torch.stack(list(rows)), 0

    return rule


torch.library.register_vmap("acs_triton::conv", _batching_rule(conv, folds=(0,)), lib=LIBRARY)
torch.library.register_vmap("acs_triton::conv_act", _batching_rule(conv_act, folds=(0,)), lib=LIBRARY)
torch.library.register_vmap("acs_triton::input_grad", _batching_rule(input_grad, folds=(0,)), lib=LIBRARY)
torch.library.register_vmap("acs_triton::weight_grad", _batching_rule(weight_grad, folds=()), lib=LIBRARY)


def _gradients_batching_rule(info, in_dims, grad_output, input, weight, *params):
    def both(grad_output, input, weight):
        of_input = input_grad(grad_output, weight, input.shape[2:], *params)
        return of_input, weight_grad(grad_output, input, *params)

    return torch.vmap(both, in_dims[:3])(grad_output, input, weight), (0, 0)


torch.library.register_vmap("acs_triton::gradients", _gradients_batching_rule, lib=LIBRARY)
