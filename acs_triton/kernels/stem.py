"""ACS convolution of one to four input channels, and its weight gradient.

A gather GEMM whose depth is the flattened ``(channel, tap)`` axis (see
:mod:`acs_triton.kernels.stem_plan`). Any memory format goes in and out by its strides: with so few
channels none is better for the gather. The input gradient, which a first layer hardly ever needs,
is an ordinary matrix product with few columns and no business of this file.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
import triton
import triton.language as tl

from ..frozen import once
from ..geometry import Geometry
from ..layout import memory_format
from ..tables import keep
from . import autotune, device
from .epilogue import activated
from .partials import accumulator, needs_int64, splits, sum_partials, triton_accumulator
from .stem_plan import (
    COLUMN_FIELDS,
    MAX_CHANNELS,
    NEED_BITS,
    NEVER,
    VIEW_FIELDS,
    Plan,
    box,
    candidates,
    conv_tile,
    plan,
    weight_grad_tile,
    widest,
)


def suits(geometry: Geometry, in_channels: int, out_channels: int) -> bool:
    """Whether these kernels compute a convolution: one group of at most four input channels."""
    return geometry.groups == 1 and in_channels <= MAX_CHANNELS and sum(geometry.kernel_size) + 1 < NEED_BITS


def conv(input, weight, bias, geometry: Geometry, activation: str = ""):
    """Convolution of few input channels.

    Args:
        input: ``(N, C, D, H, W)``, any strides, ``C <= 4``.
        weight: ``(O, C, ku, kv)`` of the same dtype.
        bias: ``(O,)`` or None.
        geometry: with ``groups == 1``.
        activation: of :data:`acs_triton.activations.ACTIVATIONS`, or none.

    Returns:
        ``(N, O, *geometry.output_size)`` in the memory format of ``input``.
    """
    output = torch.empty(
        (input.shape[0], weight.shape[0], *geometry.output_size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input),
    )
    if output.numel() == 0:
        return output

    def run(tile):
        tables = plan(geometry, input.shape[1], input.stride()[1:], tile)
        # Whole steps of the depth: the loads need no mask and are 16 bytes wide.
        padding = (0, tables.depth - weight[0].numel())
        packed = once(weight, padding, lambda: torch.nn.functional.pad(weight.flatten(1), padding))
        boxes, logs = box(geometry.output_size, tile.positions)
        stem_conv_kernel[(len(tables.columns) * prod(boxes) * input.shape[0],)](
            input,
            packed,
            input if bias is None else bias,
            output,
            *_tables(tables, input.device),
            len(tables.columns),
            *boxes,
            *logs,
            tables.depth,
            input.stride(0),
            *input.stride()[2:],
            *output.stride(),
            *geometry.input_size,
            *geometry.output_size,
            *geometry.stride,
            int(bias is not None),
            ROWS=tile.positions,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            CHANNELS_LAST=memory_format(output) == torch.channels_last_3d,
            INT64=needs_int64(input, output),
            ACCUMULATOR=triton_accumulator(input.dtype),
            UPCAST=device.upcast(input.dtype),
            PRECISION=device.dot_precision(input.dtype),
            ACTIVATION=activation,
            num_warps=tile.num_warps,
            # 64-bit addresses, and products without matrix instructions, take the registers of a compiler
            # that holds back some (sm_100 and sm_120: 96 of 255).
            **(device.all_registers() if needs_int64(input, output) or device.exact(input.dtype) else {}),
        )

    with device.of(input):
        default = conv_tile(widest(geometry), input.element_size())
        sizes = *input.shape[:2], output.shape[1]
        _run(run, default, "conv", stem_conv_kernel, output, sizes, geometry, memory_format(output))
    return output


def weight_grad(grad_output, input, geometry: Geometry):
    """Gradient of :func:`conv` with respect to its weight; equal calls give equal bits.

    Args:
        grad_output: ``(N, O, *geometry.output_size)``, any strides.
        input: ``(N, C, *geometry.input_size)``, any strides, ``C <= 4``.

    Returns:
        ``(O, C, ku, kv)``, contiguous.
    """
    channels = input.shape[1]
    grad_weight = grad_output.new_empty((grad_output.shape[1], channels, *geometry.kernel_size))
    if grad_output.numel() == 0:
        return grad_weight.zero_()

    def run(tile):
        tables = plan(geometry, channels, input.stride()[1:], tile)
        boxes, logs = box(geometry.output_size, tile.positions)
        programs = len(tables.columns) * (tables.depth // tile.depth)
        samples = input.shape[0]
        each, cuts = splits(programs, prod(boxes) * samples, grad_weight.numel(), device.current().multiprocessors)
        partials = grad_output.new_empty((cuts, *grad_weight.shape), dtype=accumulator(input.dtype))
        stem_weight_grad_kernel[(programs * cuts,)](
            grad_output,
            input,
            partials,
            *_tables(tables, input.device),
            len(tables.columns),
            *boxes,
            *logs,
            tables.depth,
            each,
            samples,
            grad_weight[0].numel(),
            grad_weight.numel(),
            *grad_output.stride(),
            input.stride(0),
            *input.stride()[2:],
            *geometry.input_size,
            *geometry.output_size,
            *geometry.stride,
            ROWS=tile.positions,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            CHANNELS_LAST=memory_format(grad_output) == torch.channels_last_3d,
            INT64=needs_int64(grad_output, input),
            ACCUMULATOR=triton_accumulator(input.dtype),
            UPCAST=device.upcast(input.dtype),
            PRECISION=device.dot_precision(input.dtype),
            num_warps=tile.num_warps,
        )
        sum_partials(partials, grad_weight)

    with device.of(input):
        default = weight_grad_tile(widest(geometry), input.element_size())
        sizes, format = (*input.shape[:2], grad_output.shape[1]), memory_format(grad_output)
        _run(run, default, "weight_grad", stem_weight_grad_kernel, grad_weight, sizes, geometry, format)
    return grad_weight


def _run(launch, default, name: str, kernel, result, sizes, geometry, format) -> None:
    tiles = partial(candidates, name, result.element_size())
    autotune.run(launch, default, tiles, kernel, result, geometry, sizes, format=format)


@keep(maxsize=256)
def _tables(tables: Plan, where: torch.device) -> tuple[torch.Tensor, ...]:
    """The plan's tables on a device; cached, so that only a shape's first call copies."""
    return (
        torch.tensor(tables.views, dtype=torch.int32, device=where),
        torch.tensor(tables.pairs, dtype=torch.int64, device=where),
        torch.tensor(tables.columns, dtype=torch.int32, device=where),
    )


_VIEW = tl.constexpr(VIEW_FIELDS)
_COLUMN = tl.constexpr(COLUMN_FIELDS)
_NEVER = tl.constexpr(NEVER)
_NEED_BITS = tl.constexpr(NEED_BITS)
# Sizes, strides and the alignment of pointers stay plain run-time values, so that one binary serves every volume.
_SIZES = [f"{name}_{axis}" for name in ("x", "y", "step") for axis in "dhw"] + ["n_columns", "depth"]
_SIZES += ["n_d", "n_h", "n_w", "log_h", "log_w"]
_SIZES += ["s_xn", "s_xd", "s_xh", "s_xw"]
_STRIDES = {tensor: [f"s_{tensor}{axis}" for axis in "ncdhw"] for tensor in "yg"}
_TABLES = ("p_views", "p_pairs", "p_columns")


@triton.jit
def _split(i, n):
    """Quotient and remainder of one division."""
    quotient = i // n
    return quotient, i - quotient * n


@triton.jit
def _invalid(i, p_view, size, bits, first):
    """``bits``, with a bit set for every tap along one axis that is outside the input, and the next free bit.

    ``i`` is tap 0's position. The view's record holds ``(start, dilation, taps)``.
    """
    dilation, taps = tl.load(p_view + 1), tl.load(p_view + 2)
    for tap in range(taps):
        outside = (i + tap * dilation).to(tl.uint32) >= size.to(tl.uint32)
        bits |= outside.to(tl.int32) << (first + tap)
    return bits, first + taps


@triton.jit
def _rows(
    tile, p_view, n_d, n_h, n_w, log_h, log_w, y_d, y_h, y_w, x_d, x_h, x_w, step_d, step_h, step_w, ROWS: tl.constexpr
):
    """Sample of a box; output indices of its rows, where their tap 0 reads, and which taps read outside.

    Boxes have powers of two as edges: a row's indices are bits of its number. Dividing for each
    row was half of all instructions.
    """
    tile, w = _split(tile, n_w)
    tile, h = _split(tile, n_h)
    sample, d = _split(tile, n_d)
    row = tl.arange(0, ROWS)
    i_w = (w << log_w) + (row & ((1 << log_w) - 1))
    i_h = (h << log_h) + ((row >> log_w) & ((1 << log_h) - 1))
    i_d = d * (ROWS >> (log_h + log_w)) + (row >> (log_h + log_w))
    inside = (i_d < y_d) & (i_h < y_h) & (i_w < y_w)
    d = i_d * step_d + tl.load(p_view)
    h = i_h * step_h + tl.load(p_view + 3)
    w = i_w * step_w + tl.load(p_view + 6)
    # A row beyond the output has every bit set.
    invalid = tl.where(inside, _NEVER, 2 * _NEVER - 1)
    invalid, bit = _invalid(d, p_view, x_d, invalid, 0)
    invalid, bit = _invalid(h, p_view + 3, x_h, invalid, bit)
    invalid, bit = _invalid(w, p_view + 6, x_w, invalid, bit)
    return sample.to(tl.int64), i_d, i_h, i_w, inside, d, h, w, invalid


@triton.jit
def _offset(d, h, w, s_d, s_h, s_w, INT64: tl.constexpr):
    if INT64:
        d, h, w = d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return d * s_d + h * s_h + w * s_w


@triton.jit
def _pair(p_pair, INT64: tl.constexpr):
    """Offsets of some pairs, and the bits they need; above those, what no row's bits reach."""
    pair = tl.load(p_pair)
    offset = pair >> _NEED_BITS
    if not INT64:
        offset = offset.to(tl.int32)
    return offset, pair.to(tl.int32)


@triton.jit(
    do_not_specialize=[*_SIZES, *_STRIDES["y"], "biased"],
    do_not_specialize_on_alignment=["p_x", "p_b", "p_y", *_TABLES],
)
def stem_conv_kernel(
    p_x,
    p_w,  # (O, depth)
    p_b,  # (O,), where biased
    p_y,
    p_views,
    p_pairs,
    p_columns,
    n_columns,  # column tiles
    n_d,  # boxes along D, H, W
    n_h,
    n_w,
    log_h,  # binary logarithms of a box's edges
    log_w,
    depth,
    s_xn,
    s_xd,
    s_xh,
    s_xw,
    s_yn,
    s_yc,
    s_yd,
    s_yh,
    s_yw,
    x_d,
    x_h,
    x_w,
    y_d,
    y_h,
    y_w,
    step_d,
    step_h,
    step_w,
    biased,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr = "",
):
    # Column tiles of the same rows come next to each other: they read the same input.
    tile, column = _split(tl.program_id(0), n_columns)
    p_column = p_columns + column * _COLUMN
    o = tl.load(p_column) + tl.arange(0, COLUMNS)
    m_o = o < tl.load(p_column + 1)
    view = tl.load(p_column + 2)
    p_view = p_views + view * _VIEW
    sample, i_d, i_h, i_w, inside, d, h, w, invalid = _rows(
        tile, p_view, n_d, n_h, n_w, log_h, log_w, y_d, y_h, y_w, x_d, x_h, x_w, step_d, step_h, step_w, ROWS
    )
    p_x += sample * s_xn
    o_x = _offset(d, h, w, s_xd, s_xh, s_xw, INT64)
    k = tl.arange(0, DEPTH)
    p_pair = p_pairs + view * depth + k
    p_wk = p_w + o[None, :] * (depth // DEPTH * DEPTH) + k[:, None]

    acc = tl.zeros([ROWS, COLUMNS], ACCUMULATOR)
    for _ in range(0, depth, DEPTH):
        o_k, need = _pair(p_pair, INT64)
        # Lanes along the rows: a thread then keeps few rows' offsets and bits.
        m_x = (need[:, None] & invalid[None, :]) == 0
        x = tl.load(p_x + (o_k[:, None] + o_x[None, :]), mask=m_x, other=0.0)
        b_w = tl.load(p_wk, mask=m_o[None, :], other=0.0)
        if UPCAST:
            x, b_w = x.to(tl.float32), b_w.to(tl.float32)
        acc = tl.dot(tl.trans(x), b_w, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        p_pair += DEPTH
        p_wk += DEPTH

    acc += tl.load(p_b + o, mask=m_o & (biased != 0), other=0.0).to(ACCUMULATOR)[None, :]
    o_y = _offset(i_d, i_h, i_w, s_yd, s_yh, s_yw, INT64)
    if INT64:
        o = o.to(tl.int64)
    p_y += sample * s_yn
    y = activated(acc, ACTIVATION).to(p_y.dtype.element_ty)
    if CHANNELS_LAST:
        tl.store(p_y + o_y[:, None] + (o * s_yc)[None, :], y, mask=inside[:, None] & m_o[None, :])
    else:
        tl.store(p_y + (o * s_yc)[:, None] + o_y[None, :], tl.trans(y), mask=m_o[:, None] & inside[None, :])


@triton.jit(
    do_not_specialize=[*_SIZES, "each", "samples", "pairs", "elements", *_STRIDES["g"]],
    do_not_specialize_on_alignment=["p_g", "p_x", *_TABLES],
)
def stem_weight_grad_kernel(
    p_g,
    p_x,
    p_partial,  # (cuts, O, pairs)
    p_views,
    p_pairs,
    p_columns,
    n_columns,  # column tiles
    n_d,  # boxes along D, H, W
    n_h,
    n_w,
    log_h,  # binary logarithms of a box's edges
    log_w,
    depth,
    each,  # boxes a program takes
    samples,
    pairs,  # without the filling
    elements,  # O * pairs
    s_gn,
    s_gc,
    s_gd,
    s_gh,
    s_gw,
    s_xn,
    s_xd,
    s_xh,
    s_xw,
    x_d,
    x_h,
    x_w,
    y_d,
    y_h,
    y_w,
    step_d,
    step_h,
    step_w,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rest, column = _split(tl.program_id(0), n_columns)
    cut, step = _split(rest, depth // DEPTH)
    p_column = p_columns + column * _COLUMN
    o = tl.load(p_column) + tl.arange(0, COLUMNS)
    m_o = o < tl.load(p_column + 1)
    view = tl.load(p_column + 2)
    k = step * DEPTH + tl.arange(0, DEPTH)
    o_k, need = _pair(p_pairs + view * depth + k, INT64)
    p_view = p_views + view * _VIEW
    o_c = o * s_gc
    if INT64:
        o_c = o.to(tl.int64) * s_gc

    acc = tl.zeros([DEPTH, COLUMNS], ACCUMULATOR)
    for tile in range(cut * each, min((cut + 1) * each, samples * n_d * n_h * n_w)):
        sample, i_d, i_h, i_w, inside, d, h, w, invalid = _rows(
            tile, p_view, n_d, n_h, n_w, log_h, log_w, y_d, y_h, y_w, x_d, x_h, x_w, step_d, step_h, step_w, ROWS
        )
        o_x = _offset(d, h, w, s_xd, s_xh, s_xw, INT64)
        o_g = _offset(i_d, i_h, i_w, s_gd, s_gh, s_gw, INT64)
        m_x = (need[:, None] & invalid[None, :]) == 0
        x = tl.load(p_x + sample * s_xn + (o_k[:, None] + o_x[None, :]), mask=m_x, other=0.0)
        p_gs = p_g + sample * s_gn
        # Lanes along what is contiguous in memory.
        if CHANNELS_LAST:
            g = tl.load(p_gs + (o_g[:, None] + o_c[None, :]), mask=inside[:, None] & m_o[None, :], other=0.0)
        else:
            g = tl.load(p_gs + (o_c[:, None] + o_g[None, :]), mask=m_o[:, None] & inside[None, :], other=0.0)
            g = tl.trans(g)
        if UPCAST:
            x, g = x.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(x, g, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    p_partial += cut.to(tl.int64) * elements
    tl.store(p_partial + o[None, :] * pairs + k[:, None], acc, mask=(k < pairs)[:, None] & m_o[None, :])
