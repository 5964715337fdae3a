"""Views and copies: where the rows are afterwards."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..errors import LiftingError
from ..rows import BatchSize, Rows, infer_size, regroup, rows_of, splits_or_merges
from .elementwise import reference_rows, with_rows
from .table import dim_argument, function_name, mark, replaces, rule


def sizes_argument(args) -> list:
    """Sizes given one by one or as one sequence."""
    if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)):
        return list(args[0])
    return list(args)


def not_along_rows(rows: Rows, dim: int, what: str) -> None:
    if dim == rows.axis:
        raise LiftingError(f"it {what} along the batch, which would mix the slices of a volume")


# ---- reshape


def reshaped_rows(run, tensor: Tensor, shape: list) -> tuple[list, Rows]:
    """The shape to reshape to, free of batch sizes from another depth, and the rows it leaves."""
    rows = rows_of(tensor)
    old = list(tensor.shape)
    axis = rows.axis
    shape = infer_size(_present_shape(run, rows, old, shape), tensor.numel())
    groups = regroup(old, shape)
    if groups is None:
        raise LiftingError(f"shape {tuple(shape)} does not fit {tuple(old)}")
    axes, inner = [None] * len(shape), rows.inner
    for mine, theirs in groups:
        letters = "".join(rows.axes[index] for index in mine)
        if "r" not in letters:
            for index in theirs:
                axes[index] = _letter(letters) if shape[index] != 1 or len(mine) == len(theirs) == 1 else "o"
            continue
        if any(index < axis and old[index] != 1 for index in mine) or not theirs:
            raise LiftingError(f"shape {tuple(shape)} merges the batch into the axis before it")
        # The rows come first in the merged axes, so they come first in whatever these become.
        first = next((index for index in theirs if shape[index] != 1 or rows.slices == 1), theirs[0])
        if shape[first] % rows.slices:
            raise LiftingError(f"shape {tuple(shape)} cuts across the slices of {tuple(old)}")
        inner = shape[first] // rows.slices
        letter = _letter(letters.replace("r", "")) if rows.inner == 1 else "m"
        for index in theirs:
            axes[index] = "o" if shape[index] == 1 else letter
        axes[first] = "r"
    axes = "".join(axes)
    if axes == "rmmm" and inner == 1:
        axes = "rcpp"  # an image again, after its axes had been merged
    return shape, Rows(run, axes, rows.depth, inner, rows.pooled)


def _letter(letters: str) -> str:
    kinds = set(letters) - {"o"}
    if not kinds:
        return "o"
    return kinds.pop() if len(kinds) == 1 else "m"


def _present_shape(run, rows: Rows, old: list, shape: list) -> list:
    """``shape`` with batch sizes read at another depth replaced by the present one."""
    size = shape[0] if shape else -1
    shape = [one.now(rows) if isinstance(one, BatchSize) else one for one in shape]
    if rows.axis != 0 or rows.inner != 1 or type(size) is not int or size in (-1, 1, old[0]):
        return shape
    # A plain number, as Dynamo gives them: it may be an earlier batch size, or merge axes into the batch.
    if not run.is_stale_batch(size):
        return shape
    numel = prod(old)
    replaced = infer_size([old[0], *shape[1:]], numel)
    merged = infer_size(shape, numel)
    was_stale = prod(replaced) == numel and splits_or_merges(old[1:], replaced[1:])
    was_merged = prod(merged) == numel and size % old[0] == 0
    if was_stale and was_merged and splits_or_merges(old, merged):
        raise LiftingError(
            f"shape {tuple(shape)} of {tuple(old)} starts with a batch size from another depth, or merges axes into "
            f"the batch: both would fit; another depth of the volume tells them apart"
        )
    return replaced if was_stale else shape


def reshape(run, tensor: Tensor, shape: list) -> Tensor:
    shape, rows = reshaped_rows(run, tensor, shape)
    return run.noted(rows.put_on(tensor.reshape(shape)))


@rule("view reshape _unsafe_view", "as it is")
def _view(run, function, args, kwargs):
    tensor, shape = args[0], args[1:] or tuple(kwargs.values())
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return mark(rows_of(tensor), function(*args, **kwargs))
    return reshape(run, tensor, sizes_argument(shape))


@rule("view_as reshape_as", "as it is")
def _view_as(run, function, args, kwargs):
    return reshape(run, args[0], list(args[1].shape))


@replaces("flatten", "as it is", spatial=False)
def _flatten(run, input, start_dim=0, end_dim=-1):
    if input.dim() == 0:
        return input
    start, end = dim_argument(input, start_dim), dim_argument(input, end_dim)
    shape = list(input.shape)
    merged = 1
    for size in shape[start : end + 1]:
        merged *= size
    return reshape(run, input, [*shape[:start], merged, *shape[end + 1 :]])


@replaces("unflatten", "as it is", spatial=False)
def _unflatten(run, input, dim, sizes):
    dim = dim_argument(input, dim)
    sizes = infer_size(sizes, input.shape[dim])
    return reshape(run, input, [*input.shape[:dim], *sizes, *input.shape[dim + 1 :]])


# ---- order of the axes


def permuted(tensor: Tensor, order: list[int]) -> Tensor:
    rows = rows_of(tensor)
    axes = "".join(rows.axes[index] for index in order)
    return rows.run.noted(rows.replace(axes=axes).put_on(tensor.permute(order)))


@rule("permute", "as it is")
def _permute(run, function, args, kwargs):
    dims = sizes_argument(args[1:] or tuple(kwargs.values()))
    return permuted(args[0], [dim_argument(args[0], dim) for dim in dims])


@replaces("transpose swapaxes swapdims", "as it is", spatial=False)
def _transpose(run, input, dim0=None, dim1=None, axis0=None, axis1=None):
    first = dim_argument(input, dim0 if dim0 is not None else axis0)
    second = dim_argument(input, dim1 if dim1 is not None else axis1)
    order = list(range(input.dim()))
    order[first], order[second] = second, first
    return permuted(input, order)


@replaces("t T", "as it is", spatial=False)
def _t(run, input):
    return permuted(input, list(range(input.dim()))[::-1])


@replaces("mT mH adjoint", "as it is", spatial=False)
def _mt(run, input):
    return _transpose(run, input, -2, -1)


@replaces("movedim moveaxis", "as it is", spatial=False)
def _movedim(run, input, source, destination):
    source = [source] if isinstance(source, int) else list(source)
    destination = [destination] if isinstance(destination, int) else list(destination)
    source = [dim_argument(input, dim) for dim in source]
    destination = [dim_argument(input, dim) for dim in destination]
    rest = [dim for dim in range(input.dim()) if dim not in source]
    order = [None] * input.dim()
    for start, end in zip(source, destination, strict=True):
        order[end] = start
    for position in range(input.dim()):
        if order[position] is None:
            order[position] = rest.pop(0)
    return permuted(input, order)


# ---- axes of size 1


@rule("unsqueeze", "as it is")
def _unsqueeze(run, function, args, kwargs):
    tensor = args[0]
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    dim = dim % (tensor.dim() + 1)
    rows = rows_of(tensor)
    return rows.replace(axes=rows.axes[:dim] + "o" + rows.axes[dim:]).put_on(function(*args, **kwargs))


@replaces("squeeze", "as it is", spatial=False)
def _squeeze(run, input, dim=None):
    rows = rows_of(input)
    if dim is None:
        dims = range(input.dim())
    else:
        dims = [dim] if isinstance(dim, int) else dim
        dims = [dim_argument(input, one) for one in dims]
    # The batch of slices stays even where it happens to be one slice.
    gone = [one for one in dims if one != rows.axis and input.shape[one] == 1]
    if not gone:
        return input
    axes = "".join(letter for index, letter in enumerate(rows.axes) if index not in gone)
    return rows.replace(axes=axes).put_on(input.squeeze(tuple(gone)))


# ---- repetition


@rule("expand broadcast_to expand_as", "as it is")
def _expand(run, function, args, kwargs):
    tensor = args[0]
    name = function_name(function)
    other = args[1] if name == "expand_as" else None
    shape = list(other.shape) if name == "expand_as" else sizes_argument(args[1:] or tuple(kwargs.values()))
    rows = rows_of(tensor)
    if rows is None:  # a plain tensor expanded to the shape of slices
        return tensor.expand(shape)
    if other is not None and rows_of(other) is not None:
        tensor = with_rows(run, tensor, rows.axis, rows_of(other))
        rows = rows.replace(depth=rows_of(other).depth)
    added = len(shape) - tensor.dim()
    position = rows.axis + added
    size, wanted = shape[position], tensor.shape[rows.axis]
    if isinstance(size, BatchSize):
        size = size.now(rows)
    if size not in (wanted, -1) and not run.is_stale_batch(size):
        raise LiftingError(f"it repeats the batch of slices to {size} rows")
    shape[position] = wanted
    axes = ["o"] * added + list(rows.axes)
    for index, letter in enumerate(axes):
        if letter == "o" and shape[index] not in (1, -1):
            axes[index] = "p" if index > position and rows.pooled else "c"
    return rows.replace(axes="".join(axes)).put_on(tensor.expand(shape))


@rule("repeat_interleave", "as it is")
def _repeat_interleave(run, function, args, kwargs):
    tensor, rows = args[0], rows_of(args[0])
    times = args[1] if len(args) > 1 else kwargs["repeats"]
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if rows is None or dim is None or not isinstance(times, int):
        raise LiftingError("it repeats by a tensor, or over all axes, the slices of a volume among them")
    result = function(*args, **kwargs)
    if dim_argument(tensor, dim) == rows.axis:
        rows = rows.replace(inner=rows.inner * times)
    return mark(rows, result)


@rule("repeat tile", "as it is")
def _repeat(run, function, args, kwargs):
    tensor = args[0]
    rows = rows_of(tensor)
    repeats = sizes_argument(args[1:] or tuple(kwargs.values()))
    repeats = [1] * (tensor.dim() - len(repeats)) + repeats
    added = len(repeats) - tensor.dim()
    if repeats[rows.axis + added] != 1 or any(count != 1 for count in repeats[:added]):
        raise LiftingError("it repeats the batch, which would mix the slices of a volume")
    axes = "o" * added + rows.axes
    axes = "".join("c" if a == "o" and n != 1 else a for a, n in zip(axes, repeats, strict=True))
    return rows.replace(axes=axes).put_on(tensor.repeat(repeats))


# ---- parts


def taken(rows: Rows, dim: int) -> str:
    """Axis letters without axis ``dim``."""
    return rows.axes[:dim] + rows.axes[dim + 1 :]


@rule("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split narrow", "as it is")
def _split(run, function, args, kwargs):
    tensor, rows = args[0], rows_of(args[0])
    if function_name(function) == "narrow":
        dim = args[1] if len(args) > 1 else kwargs["dim"]
    else:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    not_along_rows(rows, dim_argument(tensor, dim), "splits")
    return mark(rows, function(*args, **kwargs))


@rule("unbind select", "as it is")
def _unbind(run, function, args, kwargs):
    tensor, rows = args[0], rows_of(args[0])
    dim = dim_argument(tensor, args[1] if len(args) > 1 else kwargs.get("dim", 0))
    not_along_rows(rows, dim, "takes single rows")
    return mark(rows.replace(axes=taken(rows, dim)), function(*args, **kwargs))


@rule("index_select flip fliplr flipud roll rot90 take_along_dim gather index_add index_copy index_fill", "each slice")
def _along_dim(run, function, args, kwargs):
    tensor, rows = args[0], rows_of(args[0])
    name = function_name(function)
    if rows is None:
        raise LiftingError("its index depends on the slices")
    if name == "fliplr":
        dims = [1]
    elif name == "flipud":
        dims = [0]
    elif name in ("roll", "rot90", "take_along_dim"):
        dims = args[2] if len(args) > 2 else kwargs.get("dims", kwargs.get("dim"))
    else:
        dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("dims"))
    if dims is None:
        raise LiftingError("it runs over all axes, the slices of a volume among them")
    for dim in [dims] if isinstance(dims, int) else dims:
        not_along_rows(rows, dim_argument(tensor, dim), "rearranges rows")
    return mark(rows, function(*args, **kwargs))


@rule("__getitem__", "as it is")
def _getitem(run, function, args, kwargs):
    tensor, index = args
    rows = rows_of(tensor)
    if rows is None:
        raise LiftingError("its index depends on the slices")
    index = list(index) if isinstance(index, tuple) else [index]
    used = sum(1 for item in index if item is not None and item is not Ellipsis and not _is_bool(item))
    if any(item is Ellipsis for item in index):
        position = next(at for at, item in enumerate(index) if item is Ellipsis)
        index[position : position + 1] = [slice(None)] * (tensor.dim() - used)
    else:
        index += [slice(None)] * (tensor.dim() - used)
    axes, dim, advanced = [], 0, False
    for item in index:
        if item is None:
            axes.append("o")
            continue
        letter = rows.axes[dim] if dim < len(rows.axes) else "o"
        if letter == "r" and not _is_all(item, tensor.shape[dim]):
            raise LiftingError("it indexes the batch, which would take slices out of a volume")
        dim += 1
        if isinstance(item, slice):
            axes.append(letter)
        elif isinstance(item, (Tensor, list)):
            if advanced or (isinstance(item, Tensor) and item.dim() != 1):
                raise LiftingError("it indexes with several arrays, or with one of more than one axis")
            advanced = True
            axes.append(letter)
    result = tensor[tuple(index)]
    return rows.replace(axes="".join(axes)).put_on(result)


def _is_bool(item) -> bool:
    return isinstance(item, bool)


def _is_all(item, size) -> bool:
    if not isinstance(item, slice):
        return False
    return (item.start in (None, 0)) and item.step in (None, 1) and (item.stop is None or item.stop == size)


@rule("__setitem__", "as it is")
def _setitem(run, function, args, kwargs):
    tensor, index, value = args
    rows = rows_of(tensor)
    if rows is None:
        rows = rows_of(value)
        if rows is None or rows.axis != 0 or tensor.dim() == 0 or tensor.shape[0] != rows.slices * rows.inner:
            raise LiftingError("it stores slices in a tensor that does not hold them on its first axis")
        rows = rows.replace(axes=(rows.axes + "c" * tensor.dim())[: tensor.dim()], pooled=False)
    first = index[0] if isinstance(index, tuple) else index
    if rows.axis != 0 or not (first is Ellipsis or _is_all(first, tensor.shape[0]) or isinstance(first, Tensor)):
        raise LiftingError("it assigns to part of the batch, which would mix the slices of a volume")
    if isinstance(value, Tensor) and value.dim() == tensor.dim():
        value = with_rows(run, value, 0, rows)
    function(tensor, index, value)
    if not (rows_of(value) is not None and rows_of(value).pooled):
        rows = rows.replace(pooled=False)
    rows.put_on(tensor)


# ---- several tensors


@replaces("cat concat concatenate", "as it is", spatial=False)
def _cat(run, tensors, dim=0, axis=None):
    tensors = list(tensors)
    rows = reference_rows(tensors)
    dim = dim_argument(tensors[0], dim if axis is None else axis)
    real = [tensor for tensor in tensors if tensor.dim() == len(rows.axes)]
    not_along_rows(rows, dim, "concatenates")
    tensors = [
        with_rows(run, tensor, rows.axis, rows) if tensor.dim() == len(rows.axes) else tensor for tensor in tensors
    ]
    records = [rows_of(tensor) for tensor in real]
    letters = [one.axes[dim] for one in records if one is not None and one.axes[dim] != "o"]
    axes = rows.axes[:dim] + (letters[0] if letters else "c") + rows.axes[dim + 1 :]
    pooled = all(one is not None and one.pooled for one in records)
    return rows.replace(axes=axes, pooled=pooled).put_on(torch.cat(tensors, dim))


@replaces("stack", "as it is", spatial=False)
def _stack(run, tensors, dim=0):
    tensors = list(tensors)
    rows = reference_rows(tensors)
    tensors = [with_rows(run, tensor, rows.axis, rows) for tensor in tensors]
    dim = dim % (tensors[0].dim() + 1)
    records = [rows_of(tensor) for tensor in tensors]
    pooled = all(one is not None and one.pooled for one in records)
    axes = rows.axes[:dim] + "c" + rows.axes[dim:]
    return rows.replace(axes=axes, pooled=pooled).put_on(torch.stack(tensors, dim))
