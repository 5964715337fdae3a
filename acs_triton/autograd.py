"""Derivatives of the three primitives.

A convolution is bilinear, so with ``T(g, x, w) = <g, conv(x, w)>`` the three primitives are the
three partial derivatives of ``T``, and the derivatives of each primitive are the other two.
Double backward, forward-mode AD and vmap follow without a further kernel.

Eager code goes through the ``torch.autograd.Function`` classes. Graphs that are traced by
``torch.compile`` or ``torch.export`` call the operators, which have the same backward formulas
registered: Dynamo does not trace a Function with a ``jvp`` of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .geometry import ConvParams


class ACSConvFunction(torch.autograd.Function):
    """``conv(input, weight, bias)`` with ``params``, a :class:`acs_triton.geometry.ConvParams`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, params):
        return ops.conv(input, weight, bias, *params.args())

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.params = inputs
        ctx.input_size, ctx.output_shape = input.shape[2:], output.shape
        _save(ctx, input, weight)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            input_grad(grad, weight, ctx.input_size, ctx.params) if needs[0] else None,
            weight_grad(grad, input, ctx.params) if needs[1] else None,
            grad.sum((0, 2, 3, 4)) if needs[2] else None,
            None,
        )

    @staticmethod
    def jvp(ctx, input_t, weight_t, bias_t, *_):
        input, weight = ctx.saved_tensors
        if input_t is None and weight_t is None:
            return bias_t.view(1, -1, 1, 1, 1).expand(ctx.output_shape).clone()
        return _sum_of_parts(
            None if input_t is None else conv(input_t, weight, bias_t, ctx.params),
            None if weight_t is None else conv(input, weight_t, bias_t if input_t is None else None, ctx.params),
        )


class ACSInputGradFunction(torch.autograd.Function):
    """``input_grad(grad_output, weight)``: the convolution's derivative for its input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_output, weight, params, *input_size):
        return ops.input_grad(grad_output, weight, input_size, *params.args())

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, ctx.params, *ctx.input_size = inputs
        _save(ctx, grad_output, weight)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            conv(grad, weight, None, ctx.params) if needs[0] else None,
            weight_grad(grad_output, grad, ctx.params) if needs[1] else None,
            None,
            *(None for _ in ctx.input_size),
        )

    @staticmethod
    def jvp(ctx, grad_output_t, weight_t, *_):
        grad_output, weight = ctx.saved_tensors
        return _sum_of_parts(
            None if grad_output_t is None else input_grad(grad_output_t, weight, ctx.input_size, ctx.params),
            None if weight_t is None else input_grad(grad_output, weight_t, ctx.input_size, ctx.params),
        )


class ACSWeightGradFunction(torch.autograd.Function):
    """``weight_grad(grad_output, input)``: the convolution's derivative for its weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_output, input, params):
        return ops.weight_grad(grad_output, input, *params.args())

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.params = inputs
        ctx.input_size = input.shape[2:]
        _save(ctx, grad_output, input)

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            conv(input, grad, None, ctx.params) if needs[0] else None,
            input_grad(grad_output, grad, ctx.input_size, ctx.params) if needs[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx, grad_output_t, input_t, *_):
        grad_output, input = ctx.saved_tensors
        return _sum_of_parts(
            None if grad_output_t is None else weight_grad(grad_output_t, input, ctx.params),
            None if input_t is None else weight_grad(grad_output, input_t, ctx.params),
        )


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, params: ConvParams) -> Tensor:
    """Differentiable convolution."""
    if torch.compiler.is_compiling():
        return ops.conv(input, weight, bias, *params.args())
    return ACSConvFunction.apply(input, weight, bias, params)


def input_grad(grad_output: Tensor, weight: Tensor, input_size, params: ConvParams) -> Tensor:
    """Differentiable input gradient of :func:`conv`."""
    if torch.compiler.is_compiling():
        return ops.input_grad(grad_output, weight, input_size, *params.args())
    # Sizes are passed one by one: functorch flattens tuples among a Function's arguments.
    return ACSInputGradFunction.apply(grad_output, weight, params, *input_size)


def weight_grad(grad_output: Tensor, input: Tensor, params: ConvParams) -> Tensor:
    """Differentiable weight gradient of :func:`conv`."""
    if torch.compiler.is_compiling():
        return ops.weight_grad(grad_output, input, *params.args())
    return ACSWeightGradFunction.apply(grad_output, input, params)


def _save(ctx, first: Tensor, second: Tensor) -> None:
    # Each operand is needed for the other one's derivative alone: a frozen layer keeps no activation.
    needs = ctx.needs_input_grad
    ctx.save_for_backward(first if needs[1] else None, second if needs[0] else None)
    if hasattr(ctx, "save_for_forward"):
        ctx.save_for_forward(first, second)


def _sum_of_parts(first: Tensor | None, second: Tensor | None) -> Tensor:
    parts = [part for part in (first, second) if part is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _register(name: str, function: type, operands: int, sizes: bool = False) -> None:
    """Give an operator the backward formula of its Function: the flat arguments as one ConvParams, and back."""
    first_param = operands + sizes

    def setup_context(ctx, inputs, output):
        params = ConvParams.from_args(inputs[first_param:])
        ctx.flat_arguments = len(inputs)
        function.setup_context(ctx, (*inputs[:operands], params, *(inputs[operands] if sizes else ())), output)

    def backward(ctx, grad):
        grads = function.backward(ctx, grad)[:operands]
        return (*grads, *(None for _ in range(ctx.flat_arguments - operands)))

    torch.library.register_autograd(f"acs_triton::{name}", backward, setup_context=setup_context)


_register("conv", ACSConvFunction, operands=3)
_register("input_grad", ACSInputGradFunction, operands=2, sizes=True)
_register("weight_grad", ACSWeightGradFunction, operands=2)
