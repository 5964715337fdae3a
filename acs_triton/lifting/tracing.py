"""``torch.compile`` of lifted networks: every function that has a rule must reach it."""

from __future__ import annotations

import functools
import sys

import torch.nn.functional as F
from torch.overrides import get_overridable_functions

_IGNORED = (F.hardsigmoid, F.hardswish, F.sigmoid, F.tanh)
"""Functions on which eager PyTorch asks a ``TorchFunctionMode``, but which it lists as ignored."""


@functools.cache
def ask_about_all_functions() -> None:
    """Let Dynamo ask modes about these functions too, as eager PyTorch does.

    It goes by the list of overridable functions. Without this a lifted network loses track of
    the slices at a ``hardswish`` when it is compiled.
    """
    listed = get_overridable_functions()[F]
    missing = [function for function in _IGNORED if function not in listed]
    listed.extend(missing)
    dynamo = sys.modules.get("torch._dynamo.variables.torch")
    if dynamo is not None:  # it has made a set of the list, or will
        dynamo.get_overridable_functions.cache_clear()
