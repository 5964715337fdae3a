"""Operations on single positions: they run on the slices as they are, once the rows line up."""

from __future__ import annotations

from torch import Tensor

from ..errors import LiftingError
from ..rows import Rows, describe_tensor, repeat_rows, rows_of, tensors_in
from .table import IN_PLACE, mark, rule

_OPERATORS = "add sub mul truediv floordiv mod pow and or xor lshift rshift div matmul"
_UNARY = """
abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh bitwise_not ceil
celu clamp clamp_max clamp_min clip conj cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expit expm1 fix float
floor frac gelu hardshrink hardsigmoid hardswish hardtanh i0 imag isfinite isinf isnan isneginf isposinf isreal
leaky_relu lgamma log log10 log1p log2 logical_not logit logsigmoid log_sigmoid mish nan_to_num neg negative ones_like
zeros_like full_like positive real reciprocal relu relu6 rrelu round rsqrt selu sgn sigmoid sign signbit silu sin sinc
sinh softplus softshrink softsign special_expit sqrt square tan tanh tanhshrink threshold trunc
bool byte char double half bfloat16 int long short to type_as clone contiguous detach data alias cpu cuda
__invert__ __neg__ __pos__ __abs__ fill zero empty_like resolve_conj resolve_neg copy lift_fresh
as_tensor _threshold
"""
_MANY = """
add sub subtract mul multiply div divide true_divide floor_divide fmod remainder pow float_power rsub atan2 arctan2
hypot maximum minimum fmax fmin lerp addcmul addcdiv where masked_fill logical_and logical_or logical_xor bitwise_and
bitwise_or bitwise_xor eq ne lt le gt ge not_equal less less_equal greater greater_equal isclose copysign
heaviside ldexp logaddexp logaddexp2 nextafter xlogy prelu _prelu_kernel copy polar complex
"""


def _names() -> str:
    dunders = [f"__{before}{name}__" for name in _OPERATORS.split() if name != "matmul" for before in ("", "r", "i")]
    compared = [f"__{name}__" for name in ["eq", "ne", "lt", "le", "gt", "ge"]]
    return " ".join([*dunders, *compared, *_UNARY.split(), *_MANY.split()])


def reference_rows(operands: list[Tensor]) -> Rows:
    """The record that the result follows: the one that knows its slices apart, and the deepest of these."""
    found = [rows_of(tensor) for tensor in operands]
    found = [rows for rows in found if rows is not None]
    apart = [rows for rows in found if not rows.pooled] or found
    best = apart[0]
    for rows in apart[1:]:
        if best.depth == 1 and rows.depth != 1:
            best = rows
    return best


def with_rows(run, tensor: Tensor, axis: int, rows: Rows, *, nearest: bool = False) -> Tensor:
    """``tensor`` with as many rows on ``axis`` as a tensor of ``rows`` has.

    A tensor of whole volumes is repeated for the other depth. A tensor that the network made
    without looking at the slices has either one row, or equal rows, or random ones (drop path);
    what it drew for the first slice of a volume then holds for the whole volume. With
    ``nearest`` a volume of fewer slices is repeated to the other depth.
    """
    size, wanted = tensor.shape[axis], rows.slices * rows.inner
    own = rows_of(tensor)
    if own is None:
        if size == 1 or (size == wanted and (rows.depth == 1 or tensor.stride(axis) == 0)):
            return tensor
        if rows.inner == 1 and size % run.volumes == 0:
            first = tensor.unflatten(axis, (run.volumes, -1)).select(axis + 1, 0)
            return repeat_rows(first, axis, rows.depth)
        return tensor
    if own.axis != axis:
        raise LiftingError(f"the slices are on different axes of {describe_tensor(tensor)} and its partner")
    if own.depth == rows.depth:
        return tensor
    if own.inner == rows.inner == 1 and (own.pooled or own.depth == 1):
        first = tensor.unflatten(axis, (run.volumes, own.depth)).select(axis + 1, 0)
        return repeat_rows(first, axis, rows.depth)
    if nearest and own.inner == rows.inner == 1 and rows.depth % own.depth == 0:
        return repeat_rows(tensor, axis, rows.depth // own.depth)
    raise LiftingError(
        f"volumes of depth {own.depth} and {rows.depth} meet; choose a depth that the network's "
        f"downsampling divides, as for height and width"
    )


def deepest_rows(operands: list[Tensor]) -> Rows:
    """The record with most slices: what factors of a product are repeated to."""
    # Dynamo of torch 2.9 knows no `max` with a key.
    return sorted([rows for rows in map(rows_of, operands) if rows is not None], key=lambda rows: -rows.depth)[0]


def broadcast_axes(operands: list[Tensor], dim: int) -> str:
    """Axis letters of an element-wise result with ``dim`` axes."""
    axes = []
    for position in range(dim):
        letters = []
        for tensor in operands:
            rows = rows_of(tensor)
            index = position - (dim - tensor.dim())
            if index < 0:
                continue
            if rows is not None:
                letters.append(rows.axes[index])
            elif tensor.shape[index] != 1:
                letters.append("c")
        axes.append(next((letter for letter in "rpmc" if letter in letters), "o"))
    return "".join(axes)


def _check_target(target: Tensor, aligned: Tensor) -> None:
    """An operation in place cannot write to a repeated copy; one row for each slice is what it must have."""
    if target.shape != aligned.shape:
        raise LiftingError(f"it works in place on {describe_tensor(target)}, which has not one row for each slice")


@rule(_names(), "as it is")
def elementwise(run, function, args, kwargs):
    operands = tensors_in(args) + tensors_in(kwargs.values())
    rows = reference_rows(operands)
    if len(operands) == 1:
        return mark(rows, function(*args, **kwargs))
    pooled = all(one is None or one.pooled for one in [rows_of(tensor) for tensor in operands])
    from_right = len(rows.axes) - rows.axis

    def aligned(item):
        if isinstance(item, Tensor) and item.dim() >= from_right:
            return with_rows(run, item, item.dim() - from_right, rows)
        return item

    if function.__name__ in IN_PLACE:
        _check_target(args[0], aligned(args[0]))
        args = [args[0], *(aligned(item) for item in args[1:])]
    else:
        args = [aligned(item) for item in args]
    kwargs = {key: aligned(item) for key, item in kwargs.items()}
    result = function(*args, **kwargs)
    shaped = result[0] if isinstance(result, (tuple, list)) else result
    dims = [tensor.dim() for tensor in operands]
    axes = rows.axes if dims.count(dims[0]) == len(dims) == 1 else broadcast_axes(operands, shaped.dim())
    return mark(Rows(run, axes, rows.depth, rows.inner, pooled), result)
