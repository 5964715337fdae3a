"""Which path a call takes, and why, without running it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import amp, backends, functional
from .arguments import checked_params
from .geometry import VIEWS
from .layout import memory_format


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    split=None,
    aligned: bool = False,
    soft: bool = False,
) -> str:
    """What would compute :func:`acs_triton.functional.acs_conv3d` and its two gradients, one line each.

    Arguments and errors are that function's; under autocast it speaks of the cast tensors. A line
    names the backend; for Triton the kernel, its tile, the tensors that are converted to channels-last
    memory first and the bytes that this moves; for torch the reason. A tile with ``merged=True`` reads
    the positions of all views in one pass, each of them once.

    Args:
        soft: ask for :func:`acs_triton.functional.soft_acs_conv3d` instead, whatever its view weights.

    >>> print(explain(torch.zeros(1, 3, 8, 8, 8), torch.zeros(6, 3, 3, 3), padding=1))
    conv        torch: the tensors are on the CPU
    input_grad  torch: the tensors are on the CPU
    weight_grad torch: the tensors are on the CPU
    """
    input, weight, bias = amp.cast(input, weight, bias)
    params = checked_params(input, weight, bias, stride, padding, dilation, groups, split, aligned)
    input = input if input.dim() == 5 else input.unsqueeze(0)
    each = ""
    if soft:
        params, whole = functional.soft_params(params, input.shape[2:]), params
        if params is None:
            params, each = whole.one_view(0, weight.shape[0]), ", and so for each of the three views"
        elif not params.split:
            weight = weight.unsqueeze(2).expand(-1, -1, len(VIEWS), -1, -1)
    geometry = params.geometry(input.shape[2:])
    shape = (input.shape[0], weight.shape[0], *geometry.output_size)
    grad = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    calls = {"conv": (input, weight), "input_grad": (grad, weight), "weight_grad": (grad, input)}
    return "\n".join(f"{name:11} {backends.describe(name, *data, geometry)}{each}" for name, data in calls.items())
