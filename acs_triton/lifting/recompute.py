"""Gradient checkpoints inside a lifted network: what they recompute runs as it ran first.

``torch.utils.checkpoint`` runs a function once more in the backward pass, when the network's
forward pass is over. The two methods of PyTorch that keep the function, one for each kind of checkpoint, are
replaced by ones that keep its surroundings too: the run, the layer it was called from, the
depths seen up to there, and the rows of its arguments (the reentrant kind detaches these, so they
come without).
"""

from __future__ import annotations

import functools

import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from .errors import LiftingError
from .rows import rows_of, tensors_in
from .run import Run, images


def follow_checkpoints() -> None:
    """Let checkpoints keep the run that they were made in; others stay as they are. Once is enough."""
    for kind, name in ((checkpoints.CheckpointFunction, "forward"), (checkpoints._CheckpointFrame, "__init__")):
        method = getattr(kind, name)
        if not hasattr(method, "_acs_original"):
            replacement = _taking_surroundings(method)
            setattr(kind, name, staticmethod(replacement) if name == "forward" else replacement)


def _taking_surroundings(method):
    @functools.wraps(method)
    def replacement(owner, function, *args, **kwargs):
        return method(owner, _with_surroundings(function, args), *args, **kwargs)

    replacement._acs_original = method
    return replacement


def _with_surroundings(function, args):
    """``function`` with what surrounds this call; itself where no lifted network is running."""
    run = next((mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, Run)), None)
    if run is None and not images.depth:
        return function
    depth = images.depth
    state = None if run is None else run.state()
    rows = [rows_of(arg) for arg in args]  # the reentrant kind passes the function's own arguments last

    def resumed(*own, **kwargs):
        if run is not None and run.active:
            return function(*own, **kwargs)  # the first pass
        for arg, before in zip(reversed(own), reversed(rows), strict=False):
            if before is not None and rows_of(arg) is None:
                before.put_on(arg)
        if run is not None and not depth and any(_lost_its_rows(item) for item in tensors_in(own)):
            raise LiftingError(
                f"cannot lift {run.path}: a checkpoint inside a checkpoint is recomputed from a tensor that it "
                f"detached; use one of the two"
            )
        outside, images.depth = images.depth, depth
        try:
            if run is None:
                return function(*own, **kwargs)
            with run.resumed(state):
                return function(*own, **kwargs)
        finally:
            images.depth = outside

    return resumed


def _lost_its_rows(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4 and tensor.requires_grad and not isinstance(tensor, nn.Parameter) and rows_of(tensor) is None
    )
