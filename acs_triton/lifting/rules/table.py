"""The table that the rule modules fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import Rows, rows_of


class Rule(NamedTuple):
    """``apply(run, function, args, kwargs)``; ``spatial``: works on the plane ``(H, W)`` of an image batch."""

    apply: object
    spatial: bool
    action: str


RULES: dict[str, Rule] = {}

_QUERIES = (
    "size stride dim ndimension numel nelement shape dtype device layout ndim is_contiguous is_floating_point "
    "is_complex is_cuda is_cpu is_meta is_nested is_sparse is_quantized is_mkldnn is_mps is_xla is_xpu is_leaf "
    "is_signed is_inference is_same_size is_conj is_neg is_pinned is_shared requires_grad requires_grad_ "
    "retain_grad retains_grad grad grad_fn output_nr element_size itemsize nbytes storage_offset data_ptr "
    "get_device type names has_names __len__ __hash__ __repr__ __format__ __set__ _version register_hook "
    "untyped_storage _is_view is_tensor can_cast result_type _assert dim_order"
)
QUERIES = frozenset(_QUERIES.split())
"""Functions that look at a tensor without computing: they see the slices as the network does."""


CANONICAL: dict[str, str] = {}
"""Name in the table for the name of an in-place function."""

IN_PLACE: set[str] = set()
"""Names of functions that write to their first argument."""


def function_name(function) -> str:
    """Name of a torch function, method, operator or property, the same for its in-place form."""
    if isinstance(function, torch._ops.OpOverload):
        function = function.overloadpacket
    name = function.__name__
    if name == "__get__":
        name = function.__self__.__name__
    return CANONICAL.get(name, name)


def rule(names: str, action: str, *, spatial: bool = False):
    """Register ``apply(run, function, args, kwargs)`` for the functions ``names``."""

    def register(apply):
        for name in names.split():
            RULES[name] = Rule(apply, spatial, action)
            if not name.startswith("__"):
                CANONICAL[f"{name}_"] = name
                IN_PLACE.add(f"{name}_")
            elif name.startswith("__i") and name != "__invert__":
                IN_PLACE.add(name)
        return apply

    return register


def replaces(names: str, action: str, *, spatial: bool = True):
    """Register ``new(run, *args, **kwargs)``, written with the arguments of the function it stands for."""

    def register(new):
        def apply(run, function, args, kwargs):
            return new(run, *args, **kwargs)

        rule(names, action, spatial=spatial)(apply)
        return new

    return register


def mark(rows: Rows, result):
    """Put ``rows`` on every tensor of a result."""
    if isinstance(result, Tensor):
        return rows.put_on(result)
    if isinstance(result, (tuple, list)):
        if torch.compiler.is_compiling() and type(result) in (tuple, list):
            # Dynamo lets no attributes be set on the items of an operator's result, but on views of them.
            return type(result)([mark(rows, item[...]) if isinstance(item, Tensor) else item for item in result])
        for item in result:
            mark(rows, item)
    return result


def only_rows(args) -> Rows:
    """Rows of the first operand."""
    return rows_of(args[0])


def dim_argument(tensor: Tensor, dim: int) -> int:
    """``dim`` counted from the front."""
    return dim % tensor.dim() if tensor.dim() else 0
