"""Automatic mixed precision: convolutions under ``torch.autocast``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .frozen import derived

# Asked once: Dynamo of PyTorch 2.9 does not trace the question.
_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla"))
)
_NOTHING = nullcontext()


def _enabled(tensor: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():  # asked first: it takes no look at the tensor
        return False
    kind = tensor.device.type
    return kind in _DEVICES and torch.is_autocast_enabled(kind)


def cast(input, *operands) -> tuple:
    """The tensors in the dtype that autocast asks for, as ``conv3d`` would take them; float64 stays."""
    if not (isinstance(input, Tensor) and _enabled(input)):
        return input, *operands
    dtype = torch.get_autocast_dtype(input.device.type)
    return tuple(
        derived(one, dtype, lambda tensor: tensor.to(dtype))
        if isinstance(one, Tensor) and one.is_floating_point() and one.dtype != torch.float64
        else one
        for one in (input, *operands)
    )


def off(tensor: Tensor) -> AbstractContextManager:
    """No autocast on the tensor's device, at no cost where there is none."""
    return torch.autocast(tensor.device.type, enabled=False) if _enabled(tensor) else _NOTHING
