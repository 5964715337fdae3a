"""Gather GEMM: the convolution and its input gradient, all views in one launch.

Implicit matrix multiplication: rows are positions, columns output channels, and the depth runs
over taps and input channels. A tile of columns belongs to one view, so that the concatenation of
the views is nothing but where a tile writes. What is gathered is said by the tables of
:mod:`acs_triton.kernels.gather_tables`; the input gradient is the same kernel with other tables,
one accumulator for the three views.

Views share positions, and *merged* taps read each once for all channels: 19 instead of 27 for 3x3
kernels. For mixed views (Soft ACS) the mix is in the weights and nothing is wasted. Standard
channels have zero weights at the positions of other views; that is still less work where a third
of the channels fills a tile badly, and :func:`conv_tile` and :func:`input_grad_tile` weigh it.

Non-finite values: zero weights of another view may meet an infinite or NaN value, in the input
gradient next to a view's bound, with merged taps at all positions of other views. The results that
only the other view's taps connect to it can then be NaN too. Those of finite operands are not affected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Geometry
from ..layout import memory_format
from ..tables import keep
from . import autotune, device, gather_tables, packing, split_depth, tiles
from .channels_last import channels_last, strides, unit
from .epilogue import activated
from .packing import Packing, pack, packed_once
from .partials import triton_accumulator
from .split_depth import split_steps, store_sums

JOB_FIELDS = tl.constexpr(gather_tables.JOB_FIELDS)
AXIS_FIELDS = tl.constexpr(gather_tables.AXIS_FIELDS)

MAX_INDEX = 2**31 - 1
"""Largest row number, input offset in vectors, and program number of one launch."""


@triton.jit
def _axis_entries(p_axis, index):
    """Table entries of indices along one axis: input offset, validity bits that are off, output offset, 0."""
    return tl.load(p_axis + (index * AXIS_FIELDS)[:, None] + tl.arange(0, AXIS_FIELDS)[None, :])


# Sizes are no constants and not specialised on: one binary serves every volume.
@triton.jit(
    do_not_specialize=[
        "jobs", "splits", "samples", "w_rows", "x_sample", "y_positions", "y_channels", "biased",
    ],
    do_not_specialize_on_alignment=["p_bias", "p_sums", "p_y", "p_jobs", "p_axes", "p_steps"],
)  # fmt: skip
def gather_gemm_kernel(
    p_x,  # input, channels-last; offsets count vectors of UNIT channels
    p_w,  # packed weights (steps, w_rows, BK)
    p_bias,  # (columns,), where biased
    p_sums,  # (splits, rows, columns of all tiles), where there are several splits
    p_y,
    p_jobs,
    p_axes,
    p_steps,
    jobs,
    splits,  # programs that share the steps of a tile
    samples,
    w_rows,
    x_sample,
    y_positions,
    y_channels,
    biased,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    Y_UNIT: tl.constexpr,  # channels-last output: its channels and columns are multiples of this; 0: channels not last
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ACTIVATION: tl.constexpr = "",
):
    program = tl.program_id(0)
    p_job = p_jobs + (program % jobs) * JOB_FIELDS
    first = (program // (jobs * splits)) * BM
    split = program // jobs % splits
    size_d = tl.load(p_job)
    size_h = tl.load(p_job + 1)
    size_w = tl.load(p_job + 2)
    rows = samples * size_d * size_h * size_w
    if first >= rows:
        return

    # Rows past the end repeat the last one; they are read, and not written.
    row = first + tl.arange(0, BM)
    m_row = row < rows
    row = tl.minimum(row, rows - 1)
    w = row % size_w
    row = row // size_w
    h = row % size_h
    row = row // size_h
    d = row % size_d
    sample = row // size_d
    p_axis = p_axes + tl.load(p_job + 3)
    # One sum of loads, split at the end: what a compiler could compute again from the row number, it
    # would compute again, divisions included, for each layout that the row's values are needed in.
    field = tl.arange(0, AXIS_FIELDS)
    entry = sample[:, None] * tl.where(field == 0, x_sample, tl.where(field == 2, y_positions, 0))[None, :]
    entry += _axis_entries(p_axis, d)
    entry += _axis_entries(p_axis + size_d * AXIS_FIELDS, h)
    entry += _axis_entries(p_axis + (size_d + size_h) * AXIS_FIELDS, w)
    offsets, rest = tl.split(tl.reshape(entry, (BM, 2, AXIS_FIELDS // 2)))
    o_x, y_row = tl.split(offsets)
    off, rest = tl.split(rest)

    k = tl.arange(0, BK)
    tail = tl.where(k < tl.load(p_job + 10) * UNIT, 0, 1 << 28)
    tail |= tl.where(k < tl.load(p_job + 11) * UNIT, 0, 1 << 29)
    tail |= tl.where(k < tl.load(p_job + 12) * UNIT, 0, 1 << 30)
    # Rows and channels meet before the loop, which then neither converts layouts nor tests them apart.
    off = off[:, None] | tail[None, :]
    o_x = o_x[:, None] + (k // UNIT)[None, :]

    first_step, steps = split_steps(tl.load(p_job + 5), split, splits)
    p_step = p_steps + tl.load(p_job + 4) + first_step
    o_n = tl.arange(0, BN)
    p_w += ((tl.load(p_job + 6) + first_step).to(tl.int64) * w_rows + tl.load(p_job + 7)) * BK
    p_w += o_n[None, :] * BK + k[:, None]
    w_step = w_rows.to(tl.int64) * BK
    acc = tl.zeros((BM, BN), ACCUMULATOR)
    entry = tl.load(p_step)
    for _ in range(steps):
        offset, need = entry.to(tl.int32), (entry >> 32).to(tl.int32)
        o_tile = (o_x + offset).to(tl.int64) * UNIT + (k % UNIT)[None, :]
        b_x = tl.load(p_x + o_tile, mask=(off & need) == 0, other=0.0)
        b_w = tl.load(p_w)
        p_step += 1
        entry = tl.load(p_step)
        p_w += w_step
        if UPCAST:
            b_x = b_x.to(tl.float32)
            b_w = b_w.to(tl.float32)
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)

    if splits > 1:
        # There is one class of positions: a tile's rows are those of the output. Their numbers are computed again:
        # what was known before the loop would take registers for both ways.
        row = first + tl.arange(0, BM)
        columns = tl.load(p_job + 9)
        store_sums(p_sums, acc, split * rows + row, row < rows, columns, program % jobs, jobs)
    else:
        columns = tl.load(p_job + 9)
        # By whole vectors, where there are any: a mask that may differ within one would make stores of single elements.
        m_n = o_n // max(Y_UNIT, 1) < columns // max(Y_UNIT, 1)
        column = tl.load(p_job + 8)
        acc += tl.load(p_bias + column + o_n, mask=m_n & (biased != 0), other=0.0).to(ACCUMULATOR)[None, :]
        b_y = activated(acc, ACTIVATION).to(p_y.dtype.element_ty)
        _store(p_y, b_y, y_row, m_row, column, columns, m_n, y_positions, y_channels, Y_UNIT)


@triton.jit
def _store(p_y, b_y, y_row, m_row, column, columns, m_n, y_positions, y_channels, Y_UNIT: tl.constexpr):
    """Write a tile: rows at ``y_row``, its columns from ``column`` on."""
    BM: tl.constexpr = b_y.shape[0]
    BN: tl.constexpr = b_y.shape[1]
    o_n = tl.arange(0, BN)
    if Y_UNIT > 0:
        # 64 bits up to the tile's first row and column, 32 bits from there.
        y_first = tl.min(y_row, axis=0)
        p_y += y_first.to(tl.int64) * (y_channels // Y_UNIT) * Y_UNIT + tl.multiple_of(column, Y_UNIT)
        if Y_UNIT > 1:
            p_y = tl.multiple_of(p_y, 16)
        o_y = (y_row - y_first) * (y_channels // Y_UNIT) * Y_UNIT
    else:
        p_y += column.to(tl.int64) * y_positions
        o_y = (y_row // y_positions).to(tl.int64) * (y_channels - 1) * y_positions + y_row
    if Y_UNIT <= 1 and BM * BN > 4096:
        # Value by value: the two halves of the columns share their addresses, or registers would not suffice.
        HALF: tl.constexpr = BN // 2
        o_n = tl.arange(0, HALF)
        left, right = tl.split(tl.permute(tl.reshape(b_y, (BM, 2, HALF)), (0, 2, 1)))
        _store_columns(p_y, left, o_y, o_n, m_row, o_n < columns, y_positions, Y_UNIT)
        p_y += HALF if Y_UNIT > 0 else y_positions.to(tl.int64) * HALF
        _store_columns(p_y, right, o_y, o_n, m_row, o_n < columns - HALF, y_positions, Y_UNIT)
    else:
        _store_columns(p_y, b_y, o_y, o_n, m_row, m_n, y_positions, Y_UNIT)


@triton.jit
def _store_columns(p_y, b_y, o_y, o_n, m_row, m_n, y_positions, Y_UNIT: tl.constexpr):
    if Y_UNIT > 0:
        tl.store(p_y + o_y[:, None] + o_n[None, :], b_y, mask=m_row[:, None] & m_n[None, :])
    else:
        # Transposed, so that neighbouring threads write neighbouring positions.
        p_y += o_y[None, :] + (o_n.to(tl.int64) * y_positions)[:, None]
        tl.store(p_y, tl.trans(b_y), mask=m_n[:, None] & m_row[None, :])


@dataclass(frozen=True)
class Plan:
    """What launches of one shape share: tables on the device, and how weights are packed.

    Attributes:
        jobs, axes: tables, int32.
        steps: table, int64.
        job_count: number of jobs.
        rows: largest number of rows of a job and sample.
        most_steps: largest number of steps of a job.
        column_tiles, sum_places: tiles of the output's columns, and where their sums have each channel's.
        aligned: every tile of columns starts and ends at a whole vector.
        packing: of the weights.
    """

    jobs: Tensor
    axes: Tensor
    steps: Tensor
    job_count: int
    rows: int
    most_steps: int
    column_tiles: int
    sum_places: Tensor
    aligned: bool
    packing: Packing


def table(values, where: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(where)


def _plan(tables: gather_tables.Tables, bn: int, vector: int, where: torch.device, packed: Packing) -> Plan:
    columns = list(zip(*(tables.jobs[field :: gather_tables.JOB_FIELDS] for field in (8, 9)), strict=True))
    column_tiles, sum_places = split_depth.sum_places(columns, bn)
    return Plan(
        jobs=table(tables.jobs, where),
        axes=table(tables.axes, where),
        steps=table(tables.steps, where, torch.int64),
        job_count=tables.job_count,
        rows=tables.rows,
        most_steps=max(tables.jobs[5 :: gather_tables.JOB_FIELDS]),
        column_tiles=column_tiles,
        sum_places=table(sum_places, where),
        aligned=not any(value % vector for column in columns for value in column),
        packing=packed,
    )


@keep(maxsize=512)
def _forward_plan(geometry, in_channels, out_channels, tile, x_strides, vector, where) -> Plan:
    shape = in_channels, out_channels, tile.bn
    tables = gather_tables.forward(geometry, *shape, tile.bk, x_strides, vector, tile.merged)
    return _plan(tables, tile.bn, vector, where, packing.forward(geometry, *shape, tile, where))


@keep(maxsize=512)
def _input_grad_plan(geometry, in_channels, out_channels, tile, grad_strides, vector, where) -> Plan:
    shape = in_channels, out_channels, tile.bn
    tables = gather_tables.input_grad(geometry, *shape, tile.bk, grad_strides, vector, tile.merged)
    packed = packing.input_grad(geometry, *shape, tile, vector, tables.packed_steps, where)
    return _plan(tables, tile.bn, vector, where, packed)


def _launch(
    x: Tensor, packed: Tensor, bias: Tensor | None, y: Tensor, plan: Plan, tile: tiles.GemmTile, activation: str = ""
) -> None:
    vector = unit(x.dtype)
    last = memory_format(y) == torch.channels_last_3d
    y_unit = 0 if not last else vector if plan.aligned and y.shape[1] % vector == 0 else 1
    x_sample = strides(x)[0] // vector
    # Row numbers, input offsets and programs are 32-bit; a batch beyond that is computed in parts.
    programs = triton.cdiv(plan.rows, tile.bm) * plan.job_count
    part = max(1, MAX_INDEX // max(2 * plan.rows, x_sample, programs))
    programs = triton.cdiv(x.shape[0] * plan.rows, tile.bm) * plan.job_count
    whole = part >= x.shape[0] and plan.column_tiles == plan.job_count
    pitch = plan.column_tiles * tile.bn
    splits = split_depth.count((tile.bm, tile.bn, tile.bk), programs, plan.most_steps, y, pitch) if whole else 1
    sums = split_depth.sums(y, splits, pitch)
    for first in range(0, x.shape[0], part):
        samples = min(part, x.shape[0] - first)
        grid = (triton.cdiv(samples * plan.rows, tile.bm) * splits * plan.job_count,)
        gather_gemm_kernel[grid](
            x[first:],
            packed,
            x if bias is None else bias,
            sums,
            y[first:],
            plan.jobs,
            plan.axes,
            plan.steps,
            plan.job_count,
            splits,
            samples,
            plan.packing.rows,
            x_sample,
            math.prod(y.shape[2:]),
            y.shape[1],
            int(bias is not None),
            UNIT=vector,
            BM=tile.bm,
            BN=tile.bn,
            BK=tile.bk,
            Y_UNIT=y_unit,
            PRECISION=device.dot_precision(x.dtype),
            UPCAST=device.upcast(x.dtype),
            ACCUMULATOR=triton_accumulator(x.dtype),
            ACTIVATION=activation,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **(device.all_registers() if tile.bm * tile.bn >= 4096 else {}),
        )
    if splits > 1:
        split_depth.finish(sums, plan.sum_places, bias, y, y_unit, activation)


def conv_tile(in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry) -> tiles.GemmTile:
    """The heuristic's tile for :func:`conv`: view by view, or with merged taps where that is less work."""
    return _tile(False, in_channels, out_channels, dtype, geometry)


def input_grad_tile(in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry) -> tiles.GemmTile:
    """The heuristic's tile for :func:`input_grad`, as :func:`conv_tile`."""
    return _tile(True, in_channels, out_channels, dtype, geometry)


def _tile(
    transposed: bool, in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry
) -> tiles.GemmTile:
    shape = in_channels, out_channels, dtype.itemsize, geometry
    return _choose(transposed, *shape, merging(geometry, transposed), device.exact(dtype), device.current())


@lru_cache(maxsize=4096)
def _choose(
    transposed: bool,
    in_channels: int,
    out_channels: int,
    itemsize: int,
    geometry: Geometry,
    choices: tuple[bool, ...],
    exact: bool,
    facts: device.Device,
) -> tiles.GemmTile:
    per_group, programs = in_channels // geometry.groups, geometry.groups if transposed else 1
    works = []
    for merged in choices:
        regions = gather_tables.regions(geometry, out_channels, merged)
        widths = [region.end - region.first for region in regions]
        columns, depths = ([per_group] * geometry.groups, widths) if transposed else (widths, [per_group])
        tile = tiles.gemm_tile(columns, depths, itemsize, exact, facts.shared_memory)
        steps = geometry.tap_count(regions[0].view) * sum(-(-depth // tile.bk) for depth in depths) / programs
        work = tiles.gemm_work(tile, columns, steps, tiles.reading(facts.arch, exact))
        works.append((work, replace(tile, merged=merged)))
    return min(works, key=lambda work: work[0])[1]


def merging(geometry: Geometry, transposed: bool) -> tuple[bool, ...]:
    """What there is to choose from: taps of each view by itself, merged ones, or both, the preferred of equals first.

    Mixed views have merged taps only, and views that read the same positions have no other.
    """
    if geometry.mixed:
        return (True,)
    if geometry.coincident or gather_tables.tap_bits(geometry, transposed, merged=True) > gather_tables.TAP_BITS:
        return (False,)
    return (False, True)


def _run(launch, default: tiles.GemmTile, primitive: str, y: Tensor, channels: tuple[int, int, int], geometry) -> None:
    def candidates():
        limits = y.dtype.itemsize, device.exact(y.dtype), device.current().shared_memory
        choices = merging(geometry, primitive == "input_grad")
        return [replace(tile, merged=merged) for merged in choices for tile in tiles.gemm_tiles(*limits)]

    facts = {"primitive": primitive, "format": memory_format(y), "mixed": geometry.mixed}
    autotune.run(launch, default, candidates, gather_gemm_kernel, y, geometry, channels, **facts)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str = "") -> Tensor:
    """``(N, C, D, H, W)`` and ``(O, C/groups, ku, kv)`` to ``(N, O, *geometry.output_size)``.

    The result has the input's dtype and memory format; sums, bias and activation are float32 (float64 for float64).
    """
    shape = (input.shape[0], weight.shape[0], *geometry.output_size)
    y = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    if y.numel() == 0:
        return y
    x = channels_last(input, geometry.groups)

    def run(tile):
        vector = unit(x.dtype)
        x_strides = tuple(stride // vector for stride in strides(x)[2:])
        plan = _forward_plan(geometry, x.shape[1], weight.shape[0], tile, x_strides, vector, x.device)
        _launch(x, packed_once(weight, geometry, plan.packing, tile), bias, y, plan, tile, activation)

    with device.of(x):
        channels = input.shape[1], weight.shape[0]
        default = conv_tile(*channels, input.dtype, geometry)
        _run(run, default, "conv", y, (input.shape[0], *channels), geometry)
    return y


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(O, C/groups, ku, kv)`` to ``(N, C, *geometry.input_size)``.

    The result has the gradient's dtype and memory format.
    """
    channels = weight.shape[1] * geometry.groups
    shape = (grad_output.shape[0], channels, *geometry.input_size)
    y = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(grad_output))
    if y.numel() == 0:
        return y
    g = channels_last(grad_output)

    def run(tile):
        vector = unit(g.dtype)
        g_strides = tuple(stride // vector for stride in strides(g)[2:])
        plan = _input_grad_plan(geometry, channels, weight.shape[0], tile, g_strides, vector, g.device)
        _launch(g, pack(weight, plan.packing, tile.bk), None, y, plan, tile)

    with device.of(g):
        default = input_grad_tile(channels, weight.shape[0], grad_output.dtype, geometry)
        _run(run, default, "input_grad", y, (g.shape[0], channels, weight.shape[0]), geometry)
    return y
