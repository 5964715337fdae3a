"""Weight gradient: an implicit matrix multiplication whose depth runs over all output positions.

A program computes, for one tile of input channels (rows) and one of output channels of one view
(columns), up to three taps of a kernel row, which share the tile of the output gradient. A step of
the depth is a box of positions: where it lies is arithmetic on scalars, and which of its positions
a tap may read is one comparison an axis. The depth is split over programs; each writes its sums to
a workspace, and a second kernel adds them in a fixed order, so that results repeat bit by bit.

Tiles start at whole 16-byte vectors. Rows that belong to another channel group and columns that
belong to another view are computed along and not written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import merging
from ..geometry import VIEWS, Geometry, Triple, reach
from ..tables import keep
from . import autotune, device, gather_tables, tiles
from .channels_last import channels_last, strides, unit
from .partials import accumulator, triton_accumulator

HEAD_FIELDS = tl.constexpr(13)
TAP_FIELDS = tl.constexpr(4)


@triton.jit
def _tap(p_tap):
    """First output index that reads inside the input, how many do, and the input offset."""
    return tl.load(p_tap), tl.load(p_tap + 1), tl.load(p_tap + 2)


@triton.jit
def _within(index, first, count):
    """Whether ``first <= index < first + count``: as unsigned numbers, negative differences are large."""
    return (index - first).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def _gather(p_x, m_x, along, start, tap, UNIT: tl.constexpr):
    """Input at the positions that one tap reads: a tile of (channels, positions)."""
    inside = _within(along, tap[0] - start, tap[1])
    return tl.load(p_x + tap[2].to(tl.int64) * UNIT, mask=inside[None, :] & m_x, other=0.0)


@triton.jit
def _store(p_out, acc, p_tap, m_out, channels):
    tap = tl.load(p_tap + 3)
    tl.store(p_out + tap * channels, acc, mask=m_out & (tap >= 0))


# Sizes are no constants and not specialised on: one binary serves every volume.
@triton.jit(
    do_not_specialize=[
        "jobs", "steps", "steps_per_split", "y_d", "y_h", "y_w", "log_d", "log_h", "log_w",
        "g_sample", "g_d", "g_h", "g_w", "x_sample", "x_d", "x_h", "x_w",
        "first_channel", "channels", "out_channel", "out_split",
    ],
    do_not_specialize_on_alignment=["p_jobs"],
)  # fmt: skip
def weight_grad_kernel(
    p_g,  # output gradient, channels-last; offsets count vectors of UNIT channels
    p_x,  # input, channels-last
    p_out,  # partial sums (splits, O, taps, channels)
    p_jobs,
    jobs,
    steps,
    steps_per_split,
    y_d,
    y_h,
    y_w,
    log_d,  # a step is a box of 2**log positions; what BK leaves is samples, whose number it divides
    log_h,
    log_w,
    g_sample,
    g_d,
    g_h,
    g_w,
    x_sample,  # input offsets of a step of one output index
    x_d,
    x_h,
    x_w,
    first_channel,
    channels,
    out_channel,
    out_split,
    UNIT: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    program = tl.program_id(0)
    p_job = p_jobs + (program % jobs) * (HEAD_FIELDS + TAPS * TAP_FIELDS)
    split = program // jobs

    # Where the first box starts, and each position's distance from there: the loop moves the box only.
    size_d = 1 << log_d
    size_h = 1 << log_h
    size_w = 1 << log_w
    size_n = (BK >> log_d) >> (log_h + log_w)
    step = split * steps_per_split
    count = tl.minimum(steps_per_split, steps - step)
    boxes = tl.cdiv(y_w, size_w)
    w0 = step % boxes * size_w
    step = step // boxes
    boxes = tl.cdiv(y_h, size_h)
    h0 = step % boxes * size_h
    step = step // boxes
    boxes = tl.cdiv(y_d, size_d)
    d0 = step % boxes * size_d
    n0 = step // boxes * size_n
    i = tl.arange(0, BK)
    w = i & (size_w - 1)
    h = (i >> log_w) & (size_h - 1)
    d = (i >> (log_w + log_h)) & (size_d - 1)
    n = i >> (log_w + log_h + log_d)

    # The axis along which the program's taps lie, and the other two.
    axis = tl.load(p_job + 8)
    along = tl.where(axis == 0, d, tl.where(axis == 1, h, w))
    across1 = tl.where(axis == 0, h, d)
    across2 = tl.where(axis == 2, h, w)
    first1 = tl.load(p_job + 9)
    count1 = tl.load(p_job + 10)
    first2 = tl.load(p_job + 11)
    count2 = tl.load(p_job + 12)

    o = tl.arange(0, BO)
    c = tl.arange(0, BC)
    o_g = (n * g_sample + d * g_d + h * g_h + w * g_w)[:, None] + (o // UNIT)[None, :] + tl.load(p_job)
    o_x = (n * x_sample + d * x_d + h * x_h + w * x_w)[None, :] + (c // UNIT)[:, None] + tl.load(p_job + 4)
    m_o = (o < tl.load(p_job + 3) * UNIT)[None, :]
    m_c = (c < tl.load(p_job + 7) * UNIT)[:, None]
    p_tap = p_job + HEAD_FIELDS
    tap0 = _tap(p_tap)
    acc0 = tl.zeros((BC, BO), ACCUMULATOR)
    if TAPS == 3:
        tap1 = _tap(p_tap + TAP_FIELDS)
        tap2 = _tap(p_tap + 2 * TAP_FIELDS)
        acc1 = tl.zeros((BC, BO), ACCUMULATOR)
        acc2 = tl.zeros((BC, BO), ACCUMULATOR)

    for _ in range(count):
        origin = n0 * g_sample + d0 * g_d + h0 * g_h + w0 * g_w
        m_g = (d < y_d - d0) & (h < y_h - h0) & (w < y_w - w0)
        b_g = tl.load(
            p_g + (o_g + origin).to(tl.int64) * UNIT + (o % UNIT)[None, :], mask=m_g[:, None] & m_o, other=0.0
        )
        origin = n0 * x_sample + d0 * x_d + h0 * x_h + w0 * x_w
        start = tl.where(axis == 0, d0, tl.where(axis == 1, h0, w0))
        m_x = _within(across1, first1 - tl.where(axis == 0, h0, d0), count1)
        m_x &= _within(across2, first2 - tl.where(axis == 2, h0, w0), count2)
        m_x = m_x[None, :] & m_c
        p_x_tile = p_x + (o_x + origin).to(tl.int64) * UNIT + (c % UNIT)[:, None]
        b_x0 = _gather(p_x_tile, m_x, along, start, tap0, UNIT)
        if UPCAST:
            b_g = b_g.to(tl.float32)
            b_x0 = b_x0.to(tl.float32)
        acc0 = tl.dot(b_x0, b_g, acc0, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        if TAPS == 3:
            b_x1 = _gather(p_x_tile, m_x, along, start, tap1, UNIT)
            b_x2 = _gather(p_x_tile, m_x, along, start, tap2, UNIT)
            if UPCAST:
                b_x1 = b_x1.to(tl.float32)
                b_x2 = b_x2.to(tl.float32)
            acc1 = tl.dot(b_x1, b_g, acc1, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            acc2 = tl.dot(b_x2, b_g, acc2, input_precision=PRECISION, out_dtype=ACCUMULATOR)

        w0 += size_w
        over = w0 >= y_w
        w0 = tl.where(over, 0, w0)
        h0 += tl.where(over, size_h, 0)
        over = h0 >= y_h
        h0 = tl.where(over, 0, h0)
        d0 += tl.where(over, size_d, 0)
        over = d0 >= y_d
        d0 = tl.where(over, 0, d0)
        n0 += tl.where(over, size_n, 0)

    first_c = tl.load(p_job + 5)
    m_out = ((o >= tl.load(p_job + 1)) & (o < tl.load(p_job + 2)))[None, :]
    m_out &= _within(c, -first_c, tl.load(p_job + 6))[:, None]
    channel = tl.load(p_job) * UNIT - first_channel + o
    p_out += split.to(tl.int64) * out_split
    p_out += (channel * out_channel)[None, :] + (first_c + c)[:, None]
    _store(p_out, acc0, p_tap, m_out, channels)
    if TAPS == 3:
        _store(p_out, acc1, p_tap + TAP_FIELDS, m_out, channels)
        _store(p_out, acc2, p_tap + 2 * TAP_FIELDS, m_out, channels)


@triton.jit(
    do_not_specialize=["number_row", "splits", "partial_taps", "taps", "channels", "partial_elements", "elements"],
    do_not_specialize_on_alignment=["p_out", "p_number"],
)
def add_splits_kernel(
    p_partial,
    p_out,
    p_number,  # where MERGED: which of the partial sums' taps is that of an output channel's tap
    number_row,
    splits,
    partial_taps,
    taps,
    channels,
    partial_elements,
    elements,
    BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Sums over splits, in order: (splits, O, partial_taps, channels) to (O, channels, taps)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    channel = i % channels
    tap = i // channels % taps
    row = i // channels // taps
    number = tl.load(p_number + row * number_row + tap, mask=mask, other=0).to(tl.int32) if MERGED else tap
    p_partial += (row * partial_taps + number) * channels + channel
    acc = tl.zeros((BLOCK,), p_partial.dtype.element_ty)
    for _ in range(splits):
        acc += tl.load(p_partial, mask=mask, other=0.0)
        p_partial += partial_elements
    tl.store(p_out + (row * channels + channel) * taps + tap, acc.to(p_out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Chunk:
    """Jobs of a run of output channels whose partial sums fit into the workspace together."""

    jobs: Tensor
    first_channel: int
    end_channel: int


@lru_cache(maxsize=1024)
def tap_rows(positions: tuple[Triple, ...], length: int) -> list[tuple[list[int], int]]:
    """Taps that a program computes together: numbers of up to ``length`` that differ along one axis, and that axis.

    Each time the longest row of what is left is taken.
    """
    left, rows = dict(enumerate(positions)), []
    while left:
        lines = {}
        for number, position in left.items():
            for axis in (2, 1, 0):
                lines.setdefault((axis, position[:axis] + position[axis + 1 :]), []).append(number)
        (axis, _), numbers = max(lines.items(), key=lambda line: min(len(line[1]), length))
        rows.append((numbers[:length], axis))
        for number in numbers[:length]:
            del left[number]
    return rows


def _reach(geometry: Geometry, position: int, axis: int) -> tuple[int, int]:
    """First output index along an axis that reads inside the input at this distance, and how many do."""
    first, end = reach(position, geometry.input_size[axis], geometry.output_size[axis], geometry.stride[axis])
    return first, end - first


def _tile_jobs(geometry, in_channels, out_channels, tile, x_strides, vector):
    """Per tile of columns: its first and end output channel, and its jobs' fields."""
    per_group = in_channels // geometry.groups
    for region in gather_tables.regions(geometry, out_channels, tile.merged):
        positions = geometry.taps(region.view)
        rows = []
        for numbers, axis in tap_rows(positions, tile.taps):
            fields = [axis]
            for other in range(3):
                if other != axis:
                    fields += _reach(geometry, positions[numbers[0]][other], other)
            for number in numbers:
                offset = sum(p * s for p, s in zip(positions[number], x_strides, strict=True))
                fields += (*_reach(geometry, positions[number][axis], axis), offset, number)
            rows.append(fields + [0, 0, 0, -1] * (tile.taps - len(numbers)))
        for start in range(region.first // vector * vector, region.end, tile.bo):
            first, end = max(region.first - start, 0), min(region.end - start, tile.bo)
            columns = [start // vector, first, end, -(-end // vector)]
            jobs = []
            channel, last = region.group * per_group, (region.group + 1) * per_group
            for c in range(channel // vector * vector, last, tile.bc):
                channels = [c // vector, c - channel, per_group, -(-min(last - c, tile.bc) // vector)]
                jobs += [columns + channels + row for row in rows]
            yield start + first, start + end, jobs


@keep(maxsize=512)
def _plan(geometry, in_channels, out_channels, taps, tile, x_strides, vector, item_bytes, where) -> tuple[Chunk, ...]:
    row_bytes = in_channels // geometry.groups * taps * item_bytes
    return chunks(_tile_jobs(geometry, in_channels, out_channels, tile, x_strides, vector), row_bytes, tile.bo, where)


def chunks(tile_jobs, row_bytes: int, bo: int, where: torch.device) -> tuple[Chunk, ...]:
    """Tiles of ``bo`` columns (first and end channel, jobs), as many in a chunk as fit into the workspace.

    ``row_bytes`` are those of one output channel's partial sums.
    """
    limit = max(tiles.MAX_WORKSPACE // row_bytes, bo)
    parts = []
    for first, end, jobs in tile_jobs:
        if not parts or end - parts[-1][0] > limit:
            parts.append([first, end, []])
        parts[-1][1] = end
        parts[-1][2] += jobs
    return tuple(Chunk(torch.tensor(jobs, dtype=torch.int32).to(where), first, end) for first, end, jobs in parts)


def _launch(g: Tensor, x: Tensor, out: Tensor, geometry: Geometry, tile: tiles.WeightTile) -> None:
    out_channels, channels, *kernel = out.shape
    vector, out_taps = unit(x.dtype), math.prod(kernel)
    taps = len(geometry.merged.positions) if tile.merged else out_taps
    total = accumulator(x.dtype)
    box = tiles.box((g.shape[0], *geometry.output_size), tile.bk)
    steps = math.prod(-(-n // b) for n, b in zip((g.shape[0], *geometry.output_size), box, strict=True))
    g_sample, _, *g_strides = (stride // vector for stride in strides(g))
    x_sample, _, *x_strides = (stride // vector for stride in strides(x))
    in_channels = channels * geometry.groups
    where = tuple(x_strides), vector, total.itemsize, x.device
    for chunk in _plan(geometry, in_channels, out_channels, taps, tile, *where):
        rows = chunk.end_channel - chunk.first_channel
        elements = rows * taps * channels
        jobs = chunk.jobs.shape[0]
        most = tiles.MAX_WORKSPACE // (elements * total.itemsize)
        per_split = tiles.steps_per_split(jobs, steps, most, device.current().multiprocessors)
        splits = triton.cdiv(steps, per_split)
        partial = torch.empty((splits, elements), dtype=total, device=x.device)
        weight_grad_kernel[(jobs * splits,)](
            g,
            x,
            partial,
            chunk.jobs,
            jobs,
            steps,
            per_split,
            *geometry.output_size,
            *(size.bit_length() - 1 for size in box[1:]),
            g_sample,
            *g_strides,
            x_sample,
            *(stride * step for stride, step in zip(x_strides, geometry.stride, strict=True)),
            chunk.first_channel,
            channels,
            taps * channels,
            elements,
            UNIT=vector,
            BC=tile.bc,
            BO=tile.bo,
            BK=tile.bk,
            TAPS=tile.taps,
            PRECISION=device.dot_precision(x.dtype),
            UPCAST=device.upcast(x.dtype),
            ACCUMULATOR=triton_accumulator(x.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        number = None
        if tile.merged:
            number = merging.numbers(geometry, x.device)
            number = number if geometry.mixed else number[chunk.first_channel :]
        add_splits_kernel[(triton.cdiv(rows * out_taps * channels, 512),)](
            partial,
            out[chunk.first_channel : chunk.end_channel],
            number,
            0 if geometry.mixed else out_taps,
            splits,
            taps,
            out_taps,
            channels,
            elements,
            rows * out_taps * channels,
            BLOCK=512,
            MERGED=tile.merged,
        )


def weight_grad_tile(in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry) -> tiles.WeightTile:
    """The heuristic's tile for :func:`weight_grad`: view by view, or with merged taps where that is less work."""
    shape = in_channels, out_channels, dtype.itemsize, geometry
    return _choose(*shape, _merging(geometry), device.exact(dtype), device.current())


@lru_cache(maxsize=4096)
def _choose(
    in_channels: int,
    out_channels: int,
    itemsize: int,
    geometry: Geometry,
    choices: tuple[bool, ...],
    exact: bool,
    facts: device.Device,
) -> tiles.WeightTile:
    works = []
    for merged in choices:
        regions = gather_tables.regions(geometry, out_channels, merged)
        columns, taps = [region.end - region.first for region in regions], geometry.taps(regions[0].view)
        group_in = in_channels // geometry.groups
        tile = tiles.weight_tile(group_in, columns, len(taps), itemsize, exact, facts.shared_memory)
        work = tiles.weight_work(tile, columns, len(tap_rows(taps, tile.taps)), tiles.reading(facts.arch, exact))
        works.append((work, replace(tile, merged=merged)))
    return min(works, key=lambda work: work[0])[1]


def _merging(geometry: Geometry) -> tuple[bool, ...]:
    """As :func:`acs_triton.kernels.gather_gemm.merging`; any number of positions can be told apart here."""
    return (True,) if geometry.mixed else (False,) if geometry.coincident else (False, True)


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(N, C, *geometry.input_size)`` to ``(O, C/groups, ku, kv)``.

    The result has the gradient's dtype; sums are float32 (float64 for float64) and repeat bit by bit.
    """
    out_channels, in_channels = grad_output.shape[1], input.shape[1]
    views = (len(VIEWS),) if geometry.mixed else ()
    shape = (out_channels, in_channels // geometry.groups, *views, *geometry.kernel_size)
    out = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device)
    if grad_output.numel() == 0 or input.numel() == 0:
        return out.zero_()
    g, x = channels_last(grad_output), channels_last(input)

    def run(tile):
        _launch(g, x, out, geometry, tile)

    def candidates():
        limits = x.dtype.itemsize, device.exact(x.dtype), device.current().shared_memory
        return [replace(tile, merged=merged) for merged in _merging(geometry) for tile in tiles.weight_tiles(*limits)]

    with device.of(x):
        default = weight_grad_tile(in_channels, out_channels, x.dtype, geometry)
        channels = x.shape[0], in_channels, out_channels
        autotune.run(run, default, candidates, weight_grad_kernel, out, geometry, channels, mixed=geometry.mixed)
    return out
