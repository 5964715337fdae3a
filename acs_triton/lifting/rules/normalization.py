"""Normalization over volumes, and randomness that belongs to whole volumes."""

from __future__ import annotations

from torch.nn import functional as F

from ..errors import LiftingError
from ..rows import first_of_each_volume, repeat_rows
from .table import IN_PLACE, function_name, mark, only_rows, rule


def _per_volume(run, function, args, kwargs, rows):
    """One row a volume through ``function``, then the rows again."""
    result = function(first_of_each_volume(args[0], rows.axis, run.volumes), *args[1:], **kwargs)
    return mark(rows, repeat_rows(result, rows.axis, rows.depth))


@rule("batch_norm", "statistics over N, D, H, W")
def _batch_norm(run, function, args, kwargs):
    rows = only_rows(args)
    if rows.axis != 0:
        raise LiftingError("the slices must be on the first axis")
    if rows.pooled and rows.inner == 1:
        return _per_volume(run, function, args, kwargs, rows)
    return mark(rows, function(*args, **kwargs))


@rule(
    "batch_norm_stats batch_norm_gather_stats_with_counts batch_norm_elemt",
    "statistics over N, D, H, W, joined over processes",
)
def _synchronised_batch_norm(run, function, args, kwargs):
    """The three steps of ``nn.SyncBatchNorm``'s forward."""
    rows, name = only_rows(args), function_name(function)
    if rows.axis != 0:
        raise LiftingError("the slices must be on the first axis")
    if name == "batch_norm_gather_stats_with_counts" and rows.pooled and rows.inner == 1:
        # A pooled value is one sample, however many slices have it: so the running variance is unbiased.
        args = (*args[:-1], args[-1] / rows.depth)
    result = function(*args, **kwargs)
    return mark(rows, result) if name == "batch_norm_elemt" else result


@rule("instance_norm group_norm", "statistics over D, H, W")
def _by_volume(run, function, args, kwargs):
    tensor, rows = args[0], only_rows(args)
    if rows.axis != 0 or rows.inner != 1:
        raise LiftingError("the slices must be on the first axis")
    if "p" not in rows.axes and "m" not in rows.axes:
        return mark(rows, function(*args, **kwargs))
    if rows.axes[1] == "p":
        raise LiftingError("the channels must be on the second axis")
    # In NCDHW order: PyTorch's channels-last group norm for CPUs loses digits (5e-4 in float32), others copy.
    if rows.pooled:
        return run.like(tensor, function(run.volume(tensor).contiguous(), *args[1:], **kwargs))
    volume = tensor.unflatten(0, (run.volumes, rows.depth)).movedim(1, 2).contiguous()
    result = function(volume, *args[1:], **kwargs)
    if result.dim() == 5:
        return run.slices(result)
    return rows.put_on(result.movedim(2, 1).flatten(0, 1))


@rule(
    "dropout alpha_dropout native_dropout bernoulli rand_like randn_like uniform normal random exponential",
    "drawn once a volume where pooled",
)
def _random(run, function, args, kwargs):
    tensor, rows = args[0], only_rows(args)
    single = all(size == 1 for axis, size in enumerate(tensor.shape) if axis != rows.axis)
    if rows.inner == 1 and rows.depth > 1 and (rows.pooled or single):
        in_place = function.__name__ in IN_PLACE or kwargs.get("inplace") or _inplace_dropout(function, args)
        if in_place:
            drawn = function(first_of_each_volume(tensor, rows.axis, run.volumes).clone(), *args[1:], **kwargs)
            tensor.copy_(repeat_rows(drawn, rows.axis, rows.depth))
            return mark(rows, tensor)
        return _per_volume(run, function, args, kwargs, rows)
    return mark(rows, function(*args, **kwargs))


def _inplace_dropout(function, args) -> bool:
    return function_name(function) in ("dropout", "alpha_dropout") and len(args) > 3 and bool(args[3])


@rule("dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout", "whole channels of a volume")
def _channel_dropout(run, function, args, kwargs):
    tensor, rows = args[0], only_rows(args)
    if rows.axis != 0 or rows.inner != 1:
        raise LiftingError("the slices must be on the first axis")
    name = function_name(function)
    dropout = F.feature_alpha_dropout if name == "feature_alpha_dropout" else F.dropout3d
    if tensor.dim() != 4:
        split = tensor.unflatten(0, (run.volumes, rows.depth)).movedim(1, 2)
        split = split.reshape(*split.shape[:2], rows.depth, -1, 1)
        dropped = dropout(split, *args[1:2], *args[2:3], **{k: v for k, v in kwargs.items() if k != "inplace"})
        return mark(rows, dropped.movedim(2, 1).reshape(tensor.shape))
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    return run.like(tensor, dropout(run.volume(tensor), *args[1:3], **options))
