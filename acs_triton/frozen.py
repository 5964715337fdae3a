"""Weights of inference, and what is computed from them once and kept: packed for a kernel, or in another dtype.

To keep something, one must know when it is stale. A tensor counts its changes, but not all of them: an
edit through ``param.data``, as moving averages and some optimisers make it, does not count, and neither do
the all-gathers of FSDP2, which write a new weight where an old one was. So nothing is kept with
the parameters of networks in training, eval mode or not. What :func:`acs_triton.fuse` makes are parameters of a
class of their own, whose every change counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

_MOST = 16
"""Things kept with one weight at most, before all are dropped."""

T = TypeVar("T")


class FrozenParameter(nn.Parameter):
    """A parameter that counts the edits made through :attr:`data` as well.

    Writing to its memory behind PyTorch (through NumPy or DLPack, or from a kernel) still goes unseen.
    """

    @property
    def data(self) -> Tensor:
        return self.detach()  # which shares the count of changes

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.__dict__.pop("_kept", None)

    def __reduce_ex__(self, protocol):
        return FrozenParameter, (self.detach(), self.requires_grad)


@functools.cache
def supported() -> bool:
    """Whether this PyTorch takes parameters of another class for parameters when it traces; 2.11 does not."""
    weight = FrozenParameter(torch.zeros(1))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            weight.neg()
    except TypeError:
        return False
    return True


def is_frozen(*tensors: Tensor) -> bool:
    """Whether what is computed of these tensors now may be kept: by no tracer, and in no mode of fake tensors."""
    return (
        not torch.compiler.is_compiling()
        and all(type(one) is FrozenParameter and not one.requires_grad and not one.is_inference() for one in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def _stream(device: torch.device) -> int | None:
    """Of what is computed now; None where nothing may be kept.

    A CUDA graph computes what it reads itself: its replay must see the weight as it is then. And what one
    stream computes, another one might read too early.
    """
    if device.type == "cpu":
        return 0
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


def once(weight: Tensor, what: Hashable, compute: Callable[[], T]) -> T:
    """``compute()``, or what it gave when the weight was the same; only frozen weights keep anything.

    Args:
        weight: what ``compute`` reads; nothing else of what it reads may change.
        what: names the thing among others that are kept with the weight.
        compute: its result is shared between calls, so nobody may write to it.
    """
    if not is_frozen(weight):
        if type(weight) is FrozenParameter and weight.requires_grad:
            weight.__dict__.pop("_kept", None)  # the steps of PyTorch's fused optimisers do not count as changes
        return compute()
    stream = _stream(weight.device)
    if stream is None:
        return compute()
    state = weight._version, weight.data_ptr(), weight.dtype, weight.device
    kept = weight.__dict__.setdefault("_kept", {})
    # Autograd takes no tensors that were made in inference mode.
    key = what, stream, torch.is_inference_mode_enabled()
    found = kept.get(key)
    if found is None or found[0] != state:
        if len(kept) >= _MOST:
            kept.clear()
        found = kept[key] = state, compute()
    return found[1]


def derived(weight: Tensor, what: Hashable, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(weight)``; that of a frozen weight is kept, and frozen itself."""
    if not is_frozen(weight):
        return function(weight)
    return once(weight, what, lambda: FrozenParameter(function(weight.detach()), requires_grad=False))
