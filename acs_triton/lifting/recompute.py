"""Reentrant gradient checkpoints: the recomputation gets detached copies, which lost their rows.

``torch.utils.checkpoint`` with ``use_reentrant=True`` runs a function without gradients, and in the
backward pass once more on ``detach()``-ed inputs. These share memory with the first inputs, by
which their rows are found again. (Without reentry the inputs are the same tensors.)
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import LiftingError
from .rows import Rows, rows_of

_seen: dict[tuple, tuple[StorageWeakRef, Rows | None]] = {}
_runs = WeakSet()


def note_run(run) -> None:
    """Note a run; it lives as long as a tensor of it does."""
    _runs.add(run)


def _key(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _forget_freed() -> None:
    for key in [key for key, (storage, _) in list(_seen.items()) if storage.expired()]:
        _seen.pop(key, None)


def remember(tensors: list[Tensor]) -> None:
    """Note what a module is given, where a checkpoint may run it again: tensors that need gradients.

    Slices carry their rows; images are marked as such, or no gradient of them could be told from
    one of slices of unknown origin while volumes are about.
    """
    if not any(tensor.requires_grad for tensor in tensors):
        return
    reentrant = not torch.is_grad_enabled()
    if reentrant:
        _forget_freed()
    for tensor in tensors:
        rows = rows_of(tensor)
        if rows is None:
            tensor._acs_image = True
        if reentrant:
            _seen[_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), rows)


def recall(tensors: list[Tensor], path: str) -> Rows | None:
    """Give tensors that a checkpoint recomputes from their rows; the record of the first, None for images.

    Raises:
        LiftingError: in the middle of the backward pass of volumes, a tensor of unknown origin.
    """
    if torch._C._current_graph_task_id() == -1:
        return None
    _forget_freed()
    found, unknown = None, False
    for tensor in tensors:
        storage, rows = _seen.get(_key(tensor), (None, None))
        if rows is not None:
            rows.put_on(tensor)
            found = found or rows
        elif storage is None and not hasattr(tensor, "_acs_image"):
            unknown = unknown or (tensor.dim() == 4 and tensor.requires_grad)
    if found is None and _runs and unknown:
        raise LiftingError(
            f"cannot lift {path}: a checkpoint recomputes it from a tensor that it computed before calling a module; "
            f"put all that the checkpoint runs into one module"
        )
    return found
