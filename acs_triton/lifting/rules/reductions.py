"""Means, maxima and the like. Over all positions of the plane they become global: over the whole volume."""

from __future__ import annotations

import torch

from ..errors import LiftingError
from ..rows import repeat_rows, rows_of
from .elementwise import elementwise
from .table import dim_argument, function_name, mark, rule


def _split(run, tensor, rows):
    """Rows as ``(N, D)`` on the row axis."""
    return tensor.unflatten(rows.axis, (run.volumes, rows.depth))


_OVER_DEPTH = {
    # Sums and norms grow with the number of positions, which the 2D network was not trained for:
    # the mean over the slices keeps their size.
    "mean": lambda values, axis: values.mean(axis),
    "sum": lambda values, axis: values.mean(axis),
    "nansum": lambda values, axis: values.mean(axis),
    "nanmean": lambda values, axis: values.nanmean(axis),
    "amax": lambda values, axis: values.amax(axis),
    "amin": lambda values, axis: values.amin(axis),
    "any": lambda values, axis: values.any(axis),
    "all": lambda values, axis: values.all(axis),
    "logsumexp": lambda values, axis: values.logsumexp(axis) - torch.tensor(values.shape[axis]).log(),
}


def _arguments(name, args, kwargs):
    """``(tensor, dim, keepdim, other keyword arguments)`` of a reduction."""
    kwargs = dict(kwargs)
    order = {
        "norm": ("p", "dim", "keepdim"),
        "linalg_vector_norm": ("ord", "dim", "keepdim"),
        "vector_norm": ("ord", "dim", "keepdim"),
        "var": ("dim", "unbiased", "keepdim"),
        "std": ("dim", "unbiased", "keepdim"),
        "var_mean": ("dim", "unbiased", "keepdim"),
        "std_mean": ("dim", "unbiased", "keepdim"),
    }.get(name, ("dim", "keepdim"))
    # Cut by hand: Dynamo of torch 2.9 takes `strict=False` for strict.
    given = dict(zip(order[: len(args) - 1], args[1 : len(order) + 1], strict=True))
    if "unbiased" in given and not isinstance(given.get("dim"), (int, tuple, list)):
        raise LiftingError("it runs over all axes, the slices of a volume among them")
    given.update(kwargs)
    tensor = args[0] if args else given.pop("input", None)
    given.pop("input", None)
    dim = given.pop("dim", given.pop("axis", None))
    keepdim = given.pop("keepdim", False)
    return tensor, dim, keepdim, given


@rule(
    "mean sum nansum nanmean amax amin max min any all logsumexp norm linalg_vector_norm vector_norm var std "
    "var_mean std_mean prod median count_nonzero",
    "over all axes of the volume, if over the plane",
)
def _reduce(run, function, args, kwargs):
    name = function_name(function)
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return elementwise(run, function, args, kwargs)
    tensor, dim, keepdim, options = _arguments(name, args, kwargs)
    rows = rows_of(tensor)
    if dim is None:
        if name in ("mean", "amax", "amin", "max", "min", "any", "all", "median", "nanmean"):
            return function(*args, **kwargs)
        raise LiftingError("it runs over all axes, the slices of a volume among them")
    dims = [dim_argument(tensor, one) for one in ([dim] if isinstance(dim, int) else dim)]
    if rows.axis in dims:
        raise LiftingError("it runs over the batch, which would mix the slices of a volume")
    positions = [index for index, letter in enumerate(rows.axes) if letter in "pm"]
    everywhere = bool(positions) and all(index in dims for index in positions)
    axes = "".join(
        letter if index not in dims else "o" for index, letter in enumerate(rows.axes) if keepdim or index not in dims
    )
    left = rows.replace(axes=axes)
    indexed = name in ("max", "min", "median")  # (values, indices) within each slice
    if not everywhere or indexed or rows.pooled or rows.inner > 1 or rows.depth == 1:
        return mark(left, function(*args, **kwargs))
    if name in ("var", "std", "var_mean", "std_mean"):
        return _spread(run, name, tensor, rows, left, dims, keepdim, options)
    if name in ("norm", "linalg_vector_norm", "vector_norm"):
        power = options.get("p", options.get("ord", 2))
        power = 2.0 if power in ("fro", None) else float(power)
        # Over the volume at once: roots of a mean of powers would have no derivative at zero.
        split, over = _volume(run, tensor, rows, dims)
        values = torch.linalg.vector_norm(split, power, over, keepdim=True, dtype=options.get("dtype"))
        values = values / (rows.depth if power == 0 else rows.depth ** (1 / power))
        return _repeated(values, over, rows, left, keepdim)
    if name not in _OVER_DEPTH:
        raise LiftingError("over the plane it has no rule for volumes")
    values = _OVER_DEPTH[name](_split(run, function(*args, **kwargs), left), left.axis + 1)
    return left.replace(pooled=True).put_on(repeat_rows(values, left.axis, rows.depth))


def _volume(run, tensor, rows, dims):
    """``tensor`` with the depth on an axis of its own, and the axes ``dims`` and depth there."""
    axis = rows.axis
    return _split(run, tensor, rows), [*(index + (index > axis) for index in dims), axis + 1]


def _repeated(values, over, rows, left, keepdim):
    """Values over a whole volume, computed with ``keepdim``, on each row again."""
    gone = over[-1:] if keepdim else over
    return left.replace(pooled=True).put_on(repeat_rows(values.squeeze(tuple(gone)), left.axis, rows.depth))


def _spread(run, name, tensor, rows, left, dims, keepdim, options):
    """Variance or standard deviation over the whole volume."""
    split, over = _volume(run, tensor, rows, dims)
    correction = options.get("correction", 1 if options.get("unbiased", True) else 0)
    values, mean = torch.var_mean(split, over, correction=correction, keepdim=True)
    values = _repeated(values.sqrt() if name.startswith("std") else values, over, rows, left, keepdim)
    return (values, _repeated(mean, over, rows, left, keepdim)) if name.endswith("_mean") else values
