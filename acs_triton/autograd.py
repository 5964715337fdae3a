"""Derivatives of the three primitives, of every order, in reverse and forward mode.

A convolution is bilinear, so with ``T(g, x, w) = <g, conv(x, w)>`` the three primitives are the
three partial derivatives of ``T``, and the derivatives of each primitive are the other two.
Double backward, forward-mode AD and vmap follow without a further kernel.

The functions below are the operators' kernels for the dispatcher's key ``Autograd``, so that an
operator has its derivatives wherever it is called: in eager code, inside the transforms of
``torch.func``, and in graphs of ``torch.compile``. (``torch.library.register_autograd`` has no
forward mode: it would drop the tangents, and the derivative would come out as zero.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C, Tensor
from torch._C import _functorch as functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling

from . import backends, ops
from .activations import activate
from .frozen import FrozenParameter
from .geometry import ConvParams
from .layout import channels_last, memory_format

_PLAIN = (Tensor, torch.nn.Parameter, FrozenParameter)


class _Primitive(_SingleLevelFunction):
    """An operator that is bilinear in two tensors; its further arguments have no derivative.

    An ``autograd.Function`` for one level of ``torch.func``'s transforms: the operator, called again
    below, reaches the next level.
    """

    op: torch._ops.OpOverload
    run: Callable[..., Tensor]
    """The operator's implementation, which is called at once where no dispatcher key is given."""

    @classmethod
    def kernel(cls, keyset, *args):
        params = ConvParams.from_args(args[-ops.FIELDS :])
        with enable_single_level_autograd_function():
            return cls.apply(keyset, *args[: -ops.FIELDS], params)

    @classmethod
    def below(cls, ctx, keyset, first: Tensor, second: Tensor, *rest, params: ConvParams) -> Tensor:
        """The operator itself. Each operand is kept only if the other one's derivative is asked for."""
        needs = ctx.needs_input_grad
        ctx.save_for_backward(first if needs[2] else None, second if needs[1] else None)
        ctx.save_for_forward(first, second)
        if keyset is None:
            return cls.run(first, second, *rest, params)
        # A Function's forward runs with gradients off; the next level of torch.func decides for itself.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
            return cls.op.redispatch(keyset & _C._after_autograd_keyset, first, second, *rest, *params.args())


class ACSConvFunction(_Primitive):
    """``conv(input, weight, bias, *params)``, the fields of :class:`~acs_triton.geometry.ConvParams`."""

    op, run = ops.conv, staticmethod(ops.run_conv)

    @staticmethod
    def forward(ctx, keyset, input, weight, bias, params):
        output = ACSConvFunction.below(ctx, keyset, input, weight, bias, params=params)
        ctx.params, ctx.input_size, ctx.output_shape = params, input.shape[2:], output.shape
        ctx.last = memory_format(input) == torch.channels_last_3d
        return output

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        if ctx.last and grad.is_contiguous():
            # A loss in plain memory, or of one channel, must not set the format of all gradients before it.
            grad = channels_last(grad)
        if needs[0] and needs[1] and not _differentiated():
            if unwatched(grad, input, weight):
                for_input, for_weight = ops.run_gradients(grad, input, weight, ctx.params)
            else:
                for_input, for_weight = ops.gradients(grad, input, weight, *ctx.params.args())
        else:
            params = ctx.params.args()
            for_input = ops.input_grad(grad, weight, ctx.input_size, *params) if needs[0] else None
            for_weight = ops.weight_grad(grad, input, *params) if needs[1] else None
        for_bias = grad.sum((0, 2, 3, 4)) if needs[2] else None
        return None, for_input, for_weight, for_bias, None

    @staticmethod
    def jvp(ctx, _, input_t, weight_t, bias_t, *__):
        input, weight = ctx.saved_tensors
        args = ctx.params.args()
        if input_t is None and weight_t is None:
            return bias_t.view(1, -1, 1, 1, 1).expand(ctx.output_shape).clone()
        return _sum_of_parts(
            None if input_t is None else ops.conv(input_t, weight, bias_t, *args),
            None if weight_t is None else ops.conv(input, weight_t, bias_t if input_t is None else None, *args),
        )


class ACSInputGradFunction(_Primitive):
    """``input_grad(grad_output, weight, input_size, *params)``: the convolution's derivative for its input."""

    op, run = ops.input_grad, staticmethod(ops.run_input_grad)

    @staticmethod
    def forward(ctx, keyset, grad_output, weight, input_size, params):
        ctx.params, ctx.input_size = params, input_size
        return ACSInputGradFunction.below(ctx, keyset, grad_output, weight, input_size, params=params)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        args = ctx.params.args()
        _, *needs = ctx.needs_input_grad
        return (
            None,
            ops.conv(grad, weight, None, *args) if needs[0] else None,
            ops.weight_grad(grad_output, grad, *args) if needs[1] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, _, grad_output_t, weight_t, *__):
        grad_output, weight = ctx.saved_tensors
        args = ctx.params.args()
        return _sum_of_parts(
            None if grad_output_t is None else ops.input_grad(grad_output_t, weight, ctx.input_size, *args),
            None if weight_t is None else ops.input_grad(grad_output, weight_t, ctx.input_size, *args),
        )


class ACSWeightGradFunction(_Primitive):
    """``weight_grad(grad_output, input, *params)``: the convolution's derivative for its weight."""

    op, run = ops.weight_grad, staticmethod(ops.run_weight_grad)

    @staticmethod
    def forward(ctx, keyset, grad_output, input, params):
        ctx.params, ctx.input_size = params, input.shape[2:]
        return ACSWeightGradFunction.below(ctx, keyset, grad_output, input, params=params)

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        args = ctx.params.args()
        _, *needs = ctx.needs_input_grad
        return (
            None,
            ops.conv(input, grad, None, *args) if needs[0] else None,
            ops.input_grad(grad_output, grad, ctx.input_size, *args) if needs[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx, _, grad_output_t, input_t, *__):
        grad_output, input = ctx.saved_tensors
        args = ctx.params.args()
        return _sum_of_parts(
            None if grad_output_t is None else ops.weight_grad(grad_output_t, input, *args),
            None if input_t is None else ops.weight_grad(grad_output, input_t, *args),
        )


for _function in (ACSConvFunction, ACSInputGradFunction, ACSWeightGradFunction):
    ops.LIBRARY.impl(_function.op, _function.kernel, "Autograd", with_keyset=True)


def _conv_act_kernel(keyset, input, weight, bias, activation: str, *params) -> Tensor:
    """``conv_act`` for the dispatcher's key ``Autograd``: the derivative needs what the activation was given."""
    if _differentiable(input, weight, bias):
        return activate(ops.conv(input, weight, bias, *params), activation)
    with _C._AutoDispatchBelowAutograd():
        return ops.conv_act.redispatch(keyset & _C._after_autograd_keyset, input, weight, bias, activation, *params)


ops.LIBRARY.impl(ops.conv_act, _conv_act_kernel, "Autograd", with_keyset=True)


def _differentiable(*tensors: Tensor | None) -> bool:
    """Whether what is computed of them now may be differentiated, in reverse or in forward mode."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, params: ConvParams, activation: str | None = None
) -> Tensor:
    """Differentiable convolution, and an activation of it."""
    if not unwatched(input, weight, bias):
        if activation is None:
            return ops.conv(input, weight, bias, *params.args())
        return ops.conv_act(input, weight, bias, activation, *params.args())
    if (plan := backends.small_plan(input, weight, params)) is not None:
        return activate(backends.small.conv(input, weight, bias, plan), activation)
    if _differentiable(input, weight, bias):
        return activate(ACSConvFunction.apply(None, input, weight, bias, params), activation)
    if activation is None:
        return ops.run_conv(input, weight, bias, params)
    return ops.run_conv_act(input, weight, bias, activation, params)


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing stands between an operator and its implementation: no transform, tracer, mode or subclass.

    Then the dispatcher is left out, which takes longer than a small layer.
    """
    if (
        is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    for one in tensors:
        if one is not None and (type(one) not in _PLAIN or one.is_meta or _is_wrapped(one)):
            return False
    return True


def _is_wrapped(tensor: Tensor) -> bool:
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def _differentiated() -> bool:
    """Whether what is computed now may be differentiated in its turn, in reverse or in forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _sum_of_parts(first: Tensor | None, second: Tensor | None) -> Tensor:
    parts = [part for part in (first, second) if part is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
