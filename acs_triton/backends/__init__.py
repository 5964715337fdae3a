"""Which backend computes a call.

A backend is a module with the functions ``conv``, ``input_grad`` and ``weight_grad`` over 5-D
tensors and a resolved :class:`acs_triton.geometry.Geometry`. The choice is made call by call
and is one setting for the whole process, so that a backward pass on another thread agrees with
its forward pass.
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from ..geometry import ConvParams, Geometry
from . import small
from . import torch as torch_backend

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "ACS_TRITON_BACKEND"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_current = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"environment variable {ENVIRONMENT_VARIABLE}")


class use_backend:
    """Set the backend for the whole process; as a context manager, restore the previous one at the end.

    * ``"auto"`` (the default): Triton kernels on GPUs that they support, PyTorch elsewhere.
    * ``"torch"``: PyTorch's own convolutions.
    * ``"triton"``: the Triton kernels; an error where Triton does not drive the input's device.

    The environment variable ``ACS_TRITON_BACKEND`` sets the initial value.

    >>> with use_backend("torch"):
    ...     current_backend()
    'torch'
    """

    def __init__(self, name: str):
        global _current
        self._previous = _current
        _current = _checked(name, "backend")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._previous


def current_backend() -> str:
    """The name that :class:`use_backend` set."""
    return _current


def choose(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> ModuleType:
    """The backend for one call of a primitive (``"conv"``, ``"input_grad"``, ``"weight_grad"``).

    ``data`` and ``other`` are the primitive's first two tensors.

    Raises:
        RuntimeError: the Triton backend is set, but Triton does not drive the tensor's device.
    """
    if _takes_torch_at_once(data):
        return torch_backend
    from . import triton as triton_backend

    if triton_backend.why_not(primitive, data, other, geometry) is None:
        return triton_backend
    if _current == "triton" and (reason := triton_backend.why_not_device(data)) is not None:
        raise RuntimeError(f"the backend is set to 'triton', but {reason}; use_backend('auto') takes the torch backend")
    return torch_backend


def _takes_torch_at_once(data: Tensor) -> bool:
    # Triton is imported only where it may be used: that costs more than the rest of the library.
    return _current == "torch" or (_current == "auto" and data.device.type == "cpu")


def small_plan(input: Tensor, weight: Tensor, params: ConvParams) -> small.Plan | None:
    """The plain convolutions that compute a small layer and its derivatives; None where a primitive does."""
    if input.device.type != "cpu" or not _takes_torch_at_once(input):
        return None
    return small.plan(input, weight, params)


def describe(primitive: str, data: Tensor, other: Tensor, geometry: Geometry) -> str:
    """One line on what computes a call of a primitive, and why."""
    if _current == "torch":
        return "torch: the backend is set to 'torch'"
    if _takes_torch_at_once(data):
        return "torch: the tensors are on the CPU"
    from . import triton as triton_backend

    reason = triton_backend.why_not(primitive, data, other, geometry)
    if reason is None:
        return f"triton: {triton_backend.plan(primitive, data, other, geometry)}"
    return f"torch: {reason}"
