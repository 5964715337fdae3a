"""Operations inside single rows: attention, linear layers, softmax. They stay within each slice."""

from __future__ import annotations

from ..errors import LiftingError
from ..rows import rows_of, tensors_in
from .elementwise import deepest_rows, reference_rows, with_rows
from .layout import not_along_rows, taken
from .table import dim_argument, function_name, mark, only_rows, rule


def _dims(tensor, dim) -> list[int]:
    return [dim_argument(tensor, one) for one in ([dim] if isinstance(dim, int) else dim)]


@rule(
    "softmax log_softmax softmin gumbel_softmax normalize glu cumsum cumprod cummax cummin logcumsumexp diff "
    "sort argsort topk kthvalue argmax argmin",
    "each slice",
)
def _along_dim(run, function, args, kwargs):
    tensor, rows = args[0], only_rows(args)
    name = function_name(function)
    position = {"topk": 2, "kthvalue": 2, "normalize": 2, "gumbel_softmax": 4, "diff": 2}.get(name, 1)
    default = {"normalize": 1, "softmin": None, "argmax": None, "argmin": None}.get(name, -1)
    dim = args[position] if len(args) > position else kwargs.get("dim", default)
    if dim is None:
        raise LiftingError("it runs over all axes, the slices of a volume among them")
    dims = _dims(tensor, dim)
    for one in dims:
        not_along_rows(rows, one, "works")
    result = function(*args, **kwargs)
    if name in ("argmax", "argmin", "kthvalue") and not ((args[2:] and args[2] is True) or kwargs.get("keepdim")):
        rows = rows.replace(axes=taken(rows, dims[0]))
    return mark(rows, result)


@rule(
    "layer_norm rms_norm fused_layer_norm local_response_norm cross embedding_bag native_channel_shuffle", "each slice"
)
@rule("channel_shuffle native_layer_norm", "each slice")
def _normalized(run, function, args, kwargs):
    rows = only_rows(args)
    shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
    if isinstance(shape, (tuple, list)) and rows.axis >= args[0].dim() - len(shape):
        raise LiftingError("it normalizes over the batch")
    return mark(rows, function(*args, **kwargs))


@rule("linear", "each slice")
def _linear(run, function, args, kwargs):
    rows = only_rows(args)
    if rows is None:
        raise LiftingError("its weight depends on the slices")
    not_along_rows(rows, args[0].dim() - 1, "sums")
    letter = "c" if rows.axes[-1] in "co" else "m"
    return mark(rows.replace(axes=rows.axes[:-1] + letter), function(*args, **kwargs))


@rule("conv1d avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d conv_transpose1d", "each slice")
def _one_axis(run, function, args, kwargs):
    rows = only_rows(args)
    if rows is None or rows.axis != 0 or args[0].dim() != 3:
        raise LiftingError("its input must have the slices on the first of three axes")
    return mark(rows, function(*args, **kwargs))


@rule("matmul __matmul__ __rmatmul__ __imatmul__ bmm mm baddbmm addmm addbmm_ mv_", "each slice")
def _matmul(run, function, args, kwargs):
    operands = tensors_in(args) + tensors_in(kwargs.values())
    name = function_name(function)
    added = []
    if name in ("baddbmm", "addmm"):
        added, operands = operands[:1], operands[1:]
    left, right = operands[:2] if name != "__rmatmul__" else (operands[1], operands[0])
    rows = deepest_rows(operands)
    if min(left.dim(), right.dim()) < 2:
        raise LiftingError("it multiplies with a vector")
    from_right = []
    for tensor, summed in ((left, -1), (right, -2)):
        own = rows_of(tensor)
        if own is None:
            continue
        offset = own.axis - tensor.dim()
        if offset == summed:
            raise LiftingError("it sums over the batch, which would mix the slices of a volume")
        from_right.append(offset)
    if len(set(from_right)) > 1 or (len(from_right) == 2 and from_right[0] >= -2):
        raise LiftingError("the slices are on different axes of the factors")
    offset = from_right[0]
    if offset < -2:
        left, right = (
            with_rows(run, tensor, tensor.dim() + offset, rows, nearest=True) if tensor.dim() >= -offset else tensor
            for tensor in (left, right)
        )
    pooled = all(one is None or one.pooled for one in (rows_of(left), rows_of(right)))
    if added:
        result = function(added[0], left, right, **{key: kwargs[key] for key in kwargs if key in ("beta", "alpha")})
    else:
        result = left @ right
    dim = result.dim()
    axes = ["o"] * dim
    for tensor in (left, right):
        own = rows_of(tensor)
        for index, letter in enumerate(own.axes[:-2] if own is not None else ""):
            axes[index + dim - tensor.dim()] = letter
    axes[-2] = rows_of(left).axes[-2] if rows_of(left) is not None else "c"
    axes[-1] = rows_of(right).axes[-1] if rows_of(right) is not None else "c"
    axes[offset] = "r"
    return rows.replace(axes="".join(axes), pooled=pooled).put_on(result)


@rule("einsum", "each slice")
def _einsum(run, function, args, kwargs):
    equation, operands = args[0].replace(" ", ""), args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if "->" not in equation or "." in equation:
        raise LiftingError(f"equation {equation!r} must be explicit, without an ellipsis")
    inputs, output = equation.split("->")
    letters, names = {}, set()
    rows = reference_rows(list(operands))
    for term, tensor in zip(inputs.split(","), operands, strict=True):
        own = rows_of(tensor)
        if own is not None:
            names.add(term[own.axis])
            letters.update(zip(term, own.axes, strict=True))
    if len(names) != 1 or not names <= set(output):
        raise LiftingError(f"equation {equation!r} sums over the slices or pairs different axes of them")
    (name,) = names
    aligned = [
        with_rows(run, tensor, term.index(name), rows) if name in term else tensor
        for term, tensor in zip(inputs.split(","), operands, strict=True)
    ]
    axes = "".join(letters.get(letter, "c") for letter in output)
    pooled = all(one is None or one.pooled for one in map(rows_of, operands))
    return rows.replace(axes=axes, pooled=pooled).put_on(function(equation, *aligned))


@rule("scaled_dot_product_attention", "each slice (attention)")
def _attention(run, function, args, kwargs):
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    kwargs = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
    query, rows = kwargs["query"], rows_of(kwargs["query"])
    for name in ("key", "value"):
        tensor = kwargs[name]
        own = rows_of(tensor)
        if rows is None or own is None or own.axis != rows.axis or rows.axis >= query.dim() - 2:
            raise LiftingError("query, key and value must have the slices on the same batch axis")
        # Keys from a strided convolution have fewer slices: each serves those that it stands for.
        kwargs[name] = with_rows(run, tensor, own.axis, rows, nearest=True)
    return mark(rows, function(**kwargs))


@rule("multi_head_attention_forward", "each slice (attention)")
def _multi_head_attention(run, function, args, kwargs):
    query = args[0] if args else kwargs["query"]
    rows = rows_of(query)
    for tensor in tensors_in(args[:3]):
        own = rows_of(tensor)
        if own is None or own.axes.index("r") != 1 or own.depth != rows.depth:
            raise LiftingError("query, key and value must have the slices on their second axis")
    output, weights = function(*args, **kwargs)
    mark(rows, output)
    if weights is not None:
        mark(rows.replace(axes="r" + "c" * (weights.dim() - 3) + "pp"), weights)
    return output, weights


@rule("unfold fold im2col col2im", "each slice", spatial=False)
def _windows(run, function, args, kwargs):
    tensor, rows = args[0], only_rows(args)
    if rows.axis != 0:
        raise LiftingError("its input must have the slices on the first axis")
    name = function_name(function)
    if (
        name == "unfold"
        and len(args) > 1
        and len(args) == 4
        and tensor.dim() > args[1]
        and not isinstance(args[2], tuple)
    ):
        pass
    result = function(*args, **kwargs)
    if name == "fold":
        axes = "rcpp"
    elif result.dim() == 3 and tensor.dim() == 4:
        axes = "rcp"
    else:
        axes = rows.axes + "p"
    return rows.replace(axes=axes).put_on(result)


@rule("grid_sample", "each slice")
def _grid_sample(run, function, args, kwargs):
    tensors = tensors_in(args) + tensors_in(kwargs.values())
    rows = reference_rows(tensors)
    image, grid = (with_rows(run, tensor, 0, rows) for tensor in tensors[:2])
    if rows.axis != 0 or rows.inner != 1:
        raise LiftingError("image and grid must have the slices on the first axis")
    rest = args[2:]
    options = {key: value for key, value in kwargs.items() if key not in ("input", "grid")}
    return rows.replace(axes="rcpp").put_on(function(image, grid, *rest, **options))


@rule("new_empty new_zeros new_ones new_full new_tensor new_empty_strided", "as it is")
def _new(run, function, args, kwargs):
    return function(*args, **kwargs)


@rule("one_hot embedding", "each slice")
def _table(run, function, args, kwargs):
    rows = rows_of(args[0]) or rows_of(args[1])
    return mark(rows.replace(axes=rows.axes + "c"), function(*args, **kwargs))
