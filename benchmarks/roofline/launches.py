"""What a call would do, without doing it: kernel launches with their arguments, and PyTorch's operations.

The launchers of :mod:`acs_triton.kernels` run as they are, on a GPU that is not there: they choose
tiles, build tables and grids, and what would be launched is written down. Nothing about a launch
is told a second time here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from ..offline import OfflineDriver

_WRITTEN_ONLY = ("copy_", "fill_", "zero_", "index_copy_", "index_put_")
_MOVES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "detach")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, the number of its programs, and its arguments and options by name."""

    kernel: str
    programs: int
    arguments: dict[str, object]


@dataclass(frozen=True)
class Operation:
    """One PyTorch operation, with its bytes if it reads each operand and writes each result once.

    Attributes:
        name: ATen's, without the overload.
        read, written: bytes.
        arguments, results: the tensors and whatever else it was called with, the tensors that it returned.
    """

    name: str
    read: int
    written: int
    arguments: tuple
    results: list[Tensor]


class CountingDriver(OfflineDriver):
    """An offline target whose tensors lie on the CPU, so that the tables that drive the kernels have values."""

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; expanded axes repeat theirs."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def spanned(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class _Operations(TorchDispatchMode):
    def __init__(self, events: list):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        if name in _MOVES_NOTHING or function.is_view:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if results and all(any(one is leaf for leaf in given) for one in results) and not function._schema.is_mutable:
            return result  # nothing was to be done: contiguous() of what is contiguous
        read = given[1:] if name in _WRITTEN_ONLY else given
        sizes = sum(map(distinct_bytes, read)), sum(map(distinct_bytes, results))
        self.events.append(Operation(name, *sizes, args, results))
        return result


def record(call: Callable[[], object]) -> list[Launch | Operation]:
    """What ``call`` launches and computes, in order. Launches are written down and not made.

    Tables and the like that are built once and kept are no part of it: ``call`` runs twice.
    """
    events: list[Launch | Operation] = []

    def run(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | kwargs
        programs = 1
        for extent in grid(arguments) if callable(grid) else grid:
            programs *= extent
        events.append(Launch(kernel.fn.__name__, programs, arguments))

    with mock.patch.object(JITFunction, "run", run):
        call()
        events.clear()
        with _Operations(events):
            call()
    return events
