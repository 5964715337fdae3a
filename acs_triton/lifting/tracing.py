"""``torch.compile`` of lifted networks: every function that has a rule must reach it."""

from __future__ import annotations

import functools
import sys
from types import BuiltinFunctionType, FunctionType

import torch
import torch.nn.functional as F
from torch.overrides import get_overridable_functions

from .rules import RULES, function_name

_NAMESPACES = (torch, F, torch._C._nn)


@functools.cache
def ask_about_all_functions() -> None:
    """Let Dynamo ask a ``TorchFunctionMode`` about all functions that eager PyTorch asks one about.

    Dynamo goes by a list of overridable functions, in which some are missing (``F.hardswish``,
    in-place functions), and looks into ``F.pad`` and others, down to functions that are
    missing too. There a compiled network would lose track of its slices.
    """
    listed = get_overridable_functions()
    known = {function for functions in listed.values() for function in functions}
    for namespace in _NAMESPACES:
        for function in vars(namespace).values():
            plain = isinstance(function, (BuiltinFunctionType, FunctionType))
            if plain and function_name(function) in RULES and function not in known:
                listed[namespace].append(function)
                known.add(function)
    dynamo = sys.modules.get("torch._dynamo.variables.torch")
    if dynamo is not None:
        dynamo.get_overridable_functions.cache_clear()
