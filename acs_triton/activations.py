"""The activations that a convolution can apply to its result before it is stored."""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_FUNCTIONS = {
    "relu": (_aten.relu.default, _aten.relu_.default, {}),
    "silu": (_aten.silu.default, _aten.silu_.default, {}),
    "gelu": (_aten.gelu.default, _aten.gelu_.default, {"approximate": "none"}),
    "gelu_tanh": (_aten.gelu.default, _aten.gelu_.default, {"approximate": "tanh"}),
}
ACTIVATIONS = tuple(_FUNCTIONS)
"""Their names: ``nn.ReLU``, ``nn.SiLU``, and ``nn.GELU`` with ``approximate`` ``"none"`` and ``"tanh"``."""


def activate(tensor: Tensor, name: str | None) -> Tensor:
    """The activation of a tensor that nothing else reads; None leaves it as it is."""
    if name is None:
        return tensor
    if not torch.is_grad_enabled():
        return activate_(tensor, name)
    function, _, options = _FUNCTIONS[name]
    return function(tensor, **options)


def activate_(tensor: Tensor, name: str) -> Tensor:
    """The activation of a tensor, in place."""
    _, function, options = _FUNCTIONS[name]
    return function(tensor, **options)
