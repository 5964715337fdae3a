"""Descriptor GEMM: the convolution and its input gradient, for GPUs with a copy engine (TMA).

The same implicit matrix multiplication as :mod:`acs_triton.kernels.gather_gemm`, with two differences.
The input is read in boxes of positions that the copy engine fetches by coordinates and fills with zeros
outside the tensor: the kernel computes no addresses and no masks. And the packed weights are the left
operand: a box is then the right one, which the matrix instructions of compute capability 9.0 and 10.0 read
from shared memory where it lies; as the left one it would pass through registers. What is fetched is said
by the tables of :mod:`acs_triton.kernels.descriptor_tables`.

Non-finite values meet zero weights: channels of a neighbouring view in the input gradient, as in the
gather GEMM, and taps of other views where these are merged. An infinite or NaN value can then make
more results NaN than those connected to it, all within the cube that the views' taps span. Results of
finite operands are not affected.
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
from . import autotune, descriptor_tables, device, gather_gemm, gather_tables, packing, split_depth
from .channels_last import channels_last, unit
from .descriptors import available, describe, descriptor, in_classes, readable, repeats
from .epilogue import activated
from .packing import Packing, pack, packed_once
from .split_depth import split_steps, store_sums

JOB_FIELDS = tl.constexpr(descriptor_tables.JOB_FIELDS)
SEGMENT_FIELDS = tl.constexpr(descriptor_tables.SEGMENT_FIELDS)


@triton.jit(
    do_not_specialize=["jobs", "splits", "column_tiles", "samples", "half_rows", "y_positions", "y_channels", "biased"],
    do_not_specialize_on_alignment=["p_bias", "p_sums", "p_y", "p_jobs", "p_segments"],
)
def descriptor_gemm_kernel(
    x,  # descriptor of the input (samples and classes, three axes, channels), boxes (1, B1, B2, B3, BK)
    w,  # descriptor of the packed weights (steps * rows, BK), boxes (BO, BK)
    p_bias,  # (columns,), where biased
    p_sums,  # (splits, rows, columns of all tiles), where there are several splits
    p_y,
    p_jobs,
    p_segments,
    jobs,
    splits,  # programs that share the steps of a box
    column_tiles,  # of the output; the number of jobs, but for several classes of positions
    samples,
    half_rows,  # half of the packed rows of a step
    y_positions,
    y_channels,
    biased,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    Y_UNIT: tl.constexpr,  # channels-last output: its channels and columns are multiples of this; 0: channels not last
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STRIDED: tl.constexpr,  # whether the input's positions are in classes
    ACTIVATION: tl.constexpr = "",
):
    POSITIONS: tl.constexpr = B1 * B2 * B3
    program = tl.program_id(0)
    p_job = p_jobs + (program % jobs) * JOB_FIELDS
    boxes1 = tl.load(p_job + 8)
    boxes2 = tl.load(p_job + 9)
    boxes3 = tl.load(p_job + 10)
    split = program // jobs % splits
    box = program // (jobs * splits)
    first3 = box % boxes3 * B3
    box = box // boxes3
    first2 = box % boxes2 * B2
    box = box // boxes2
    first1 = box % boxes1 * B1
    sample = box // boxes1
    if sample >= samples:
        return

    p_segment = p_segments + tl.load(p_job) * SEGMENT_FIELDS
    row = tl.load(p_job + 2)
    before, left = split_steps(tl.load(p_job + 15), split, splits)
    before, left = 2 * before, 2 * left
    acc = tl.zeros((BO, POSITIONS), tl.float32)
    for _ in range(tl.load(p_job + 1)):
        at1 = tl.load(p_segment)
        at2 = tl.load(p_segment + 1)
        at3 = tl.load(p_segment + 2)
        if STRIDED:
            shift1 = tl.load(p_segment + 14)
            shift2 = tl.load(p_segment + 15)
            shift3 = tl.load(p_segment + 16)
            pitch1 = tl.load(p_segment + 17)
            pitch2 = tl.load(p_segment + 18)
            pitch3 = tl.load(p_segment + 19)
            first_class = sample * tl.load(p_segment + 20)
        else:
            first_class = sample
            at1 += first1
            at2 += first2
            at3 += first3
        v1 = tl.load(p_segment + 3)
        v2 = tl.load(p_segment + 4)
        v3 = tl.load(p_segment + 5)
        u1 = tl.load(p_segment + 6)
        u2 = tl.load(p_segment + 7)
        u3 = tl.load(p_segment + 8)
        channel = tl.load(p_segment + 9)
        back = tl.load(p_segment + 10)  # from the end of a tap's channels to their start
        of_blocks = tl.load(p_segment + 11).to(tl.uint32)
        of_taps = tl.load(p_segment + 12).to(tl.uint32)
        # The count goes by twos: so the division by one block is a multiplication too.
        twice = tl.load(p_segment + 13)
        first = tl.minimum(before, twice)
        end = tl.minimum(first + left, twice)
        before -= first
        left -= end - first
        for count in range(first, end, 2):
            tap = tl.umulhi(tl.cast(count, tl.uint32), of_blocks)
            u = tl.umulhi(tap, of_taps).to(tl.int32)
            tap = tap.to(tl.int32)
            i1 = at1 + tap * v1 + u * u1
            i2 = at2 + tap * v2 + u * u2
            i3 = at3 + tap * v3 + u * u3
            c = channel + count * (BK // 2) + tap * back
            i0 = first_class
            if STRIDED:
                q1 = i1 >> shift1
                q2 = i2 >> shift2
                q3 = i3 >> shift3
                i0 += (i1 - (q1 << shift1)) * pitch1 + (i2 - (q2 << shift2)) * pitch2 + (i3 - (q3 << shift3)) * pitch3
                i1 = first1 + q1
                i2 = first2 + q2
                i3 = first3 + q3
            b_x = x.load([i0, i1, i2, i3, c]).reshape(POSITIONS, BK)
            b_w = w.load([row + count * half_rows, 0])
            if UPCAST:
                b_x = b_x.to(tl.float32)
                b_w = b_w.to(tl.float32)
            acc = tl.dot(b_w, b_x.T, acc, input_precision=PRECISION)
        row += twice * half_rows
        p_segment += SEGMENT_FIELDS

    # Each way computes its rows for itself: values that both need would take registers from before the loop's end.
    if splits > 1:
        y_row, m_i = _rows(p_job, first1, first2, first3, B1, B2, B3)
        sum_row = (split * samples + sample) * y_positions + y_row
        store_sums(p_sums, tl.trans(acc), sum_row, m_i, tl.load(p_job + 4), program % jobs, column_tiles)
    else:
        column = tl.load(p_job + 3)
        columns = tl.load(p_job + 4)
        o = tl.arange(0, BO)
        # By whole vectors, where there are any: a mask that may differ within one would make stores of single elements.
        m_o = o // max(Y_UNIT, 1) < columns // max(Y_UNIT, 1)
        acc += tl.load(p_bias + column + o, mask=m_o & (biased != 0), other=0.0).to(tl.float32)[:, None]
        b_y = activated(acc, ACTIVATION).to(p_y.dtype.element_ty)
        y_row, m_i = _rows(p_job, first1, first2, first3, B1, B2, B3)
        _store(p_y, b_y, sample, y_row, m_i, column, m_o, y_positions, y_channels, Y_UNIT)


@triton.jit
def _store(p_y, b_y, sample, y_row, m_i, column, m_o, y_positions, y_channels, Y_UNIT: tl.constexpr):
    """Write a tile: its channels from ``column`` on, at the rows ``y_row`` of a sample."""
    o = tl.arange(0, b_y.shape[0])
    if Y_UNIT > 0:
        # 64 bits up to the box's first row, 32 bits from there: there are too few registers for more.
        pitch = (y_channels // Y_UNIT) * Y_UNIT
        y_first = tl.min(y_row, axis=0)
        p_y += (sample.to(tl.int64) * y_positions + y_first) * pitch + tl.multiple_of(column, Y_UNIT)
        if Y_UNIT > 1:
            p_y = tl.multiple_of(p_y, 16)
        p_y += ((y_row - y_first) * pitch)[:, None] + o[None, :]
        tl.store(p_y, tl.trans(b_y), mask=m_i[:, None] & m_o[None, :])
    else:
        p_y += (sample.to(tl.int64) * y_channels + column) * y_positions
        p_y += (o.to(tl.int64) * y_positions)[:, None] + y_row[None, :]
        tl.store(p_y, b_y, mask=m_o[:, None] & m_i[None, :])


@triton.jit
def _rows(p_job, first1, first2, first3, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr):
    """Where a box's positions are written in a sample, and which of them there are."""
    i = tl.arange(0, B1 * B2 * B3)
    i3 = first3 + i % B3
    i2 = first2 + i // B3 % B2
    i1 = first1 + i // (B3 * B2)
    m_i = (i1 < tl.load(p_job + 5)) & (i2 < tl.load(p_job + 6)) & (i3 < tl.load(p_job + 7))
    return i1 * tl.load(p_job + 11) + i2 * tl.load(p_job + 12) + i3 * tl.load(p_job + 13) + tl.load(p_job + 14), m_i


@dataclass(frozen=True)
class Plan:
    """What launches of one shape share: tables on the device, and how weights are packed.

    Attributes:
        order: of the input's three axes in its descriptor.
        jobs, segments: tables, int32.
        job_count: number of jobs.
        boxes: largest number of boxes of a job and sample.
        most_steps: largest number of steps of a job.
        column_tiles, sum_places: as in :class:`acs_triton.kernels.gather_gemm.Plan`.
        aligned: every tile of columns starts and ends at a whole vector.
        packing: of the weights.
    """

    order: tuple[int, int, int]
    jobs: Tensor
    segments: Tensor
    job_count: int
    boxes: int
    most_steps: int
    column_tiles: int
    sum_places: Tensor
    aligned: bool
    packing: Packing


def _plan(tables: descriptor_tables.Tables, vector: int, where: torch.device, packed: Packing) -> Plan:
    columns = list(zip(*(tables.jobs[field :: descriptor_tables.JOB_FIELDS] for field in (3, 4)), strict=True))
    column_tiles, sum_places = split_depth.sum_places(columns, tables.tile.bo)
    return Plan(
        order=tables.order,
        jobs=gather_gemm.table(tables.jobs, where),
        segments=gather_gemm.table(tables.segments, where),
        job_count=tables.job_count,
        boxes=tables.boxes,
        most_steps=max(tables.jobs[15 :: descriptor_tables.JOB_FIELDS]),
        column_tiles=column_tiles,
        sum_places=gather_gemm.table(sum_places, where),
        aligned=not any(value % vector for column in columns for value in column),
        packing=packed,
    )


@keep(maxsize=512)
def _forward_plan(geometry, in_channels, out_channels, tile, classes, vector, where) -> Plan:
    shape = in_channels, out_channels
    tables = descriptor_tables.forward(geometry, *shape, tile, classes)
    return _plan(tables, vector, where, packing.forward(geometry, *shape, tile.bo, tile, where))


@keep(maxsize=512)
def _input_grad_plan(geometry, in_channels, out_channels, tile, vector, where) -> Plan:
    shape = in_channels, out_channels
    tables = descriptor_tables.input_grad(geometry, *shape, tile, vector)
    packed = packing.input_grad(geometry, *shape, tile.bo, tile, vector, tables.packed_steps, where)
    return _plan(tables, vector, where, packed)


def _launch(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    plan: Plan,
    tile: descriptor_tables.Tile,
    activation: str = "",
    strided: bool = False,
) -> None:
    samples, vector = y.shape[0], unit(x.dtype)
    last = memory_format(y) == torch.channels_last_3d
    y_unit = 0 if not last else vector if plan.aligned and y.shape[1] % vector == 0 else 1
    packed = packed.view(-1, tile.bk)
    programs = samples * plan.boxes * plan.job_count
    pitch = plan.column_tiles * tile.bo
    splits = split_depth.count((math.prod(tile.box), tile.bo, tile.bk), programs, plan.most_steps, y, pitch)
    sums = split_depth.sums(y, splits, pitch)
    descriptor_gemm_kernel[(programs * splits,)](
        descriptor(x, plan.order, tile.box, tile.bk),
        describe(packed, (tile.bo, tile.bk)),
        packed if bias is None else bias,
        sums,
        y,
        plan.jobs,
        plan.segments,
        plan.job_count,
        splits,
        plan.column_tiles,
        samples,
        plan.packing.rows // 2,
        math.prod(y.shape[2:]),
        y.shape[1],
        int(bias is not None),
        B1=tile.box[0],
        B2=tile.box[1],
        B3=tile.box[2],
        BO=tile.bo,
        BK=tile.bk,
        Y_UNIT=y_unit,
        PRECISION=device.dot_precision(x.dtype),
        UPCAST=device.upcast(x.dtype),
        STRIDED=strided,
        ACTIVATION=activation,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # ptxas spills for more programs at a time than shared memory lets run (sm_100).
        **(device.all_registers() if (activation or strided) and tile.bo == 64 else {}),
    )
    if splits > 1:
        split_depth.finish(sums, plan.sum_places, bias, y, y_unit, activation)


@lru_cache(maxsize=4096)
def _choose(
    primitive: str, channels: tuple[int, int], dtype: torch.dtype, geometry: Geometry, facts: device.Device
) -> descriptor_tables.Tile | None:
    transposed = primitive == "input_grad"
    work = descriptor_tables.input_grad_work if transposed else descriptor_tables.forward_work
    other = (gather_gemm.input_grad_tile if transposed else gather_gemm.conv_tile)(*channels, dtype, geometry)
    tile = descriptor_tables.choose(
        [work(geometry, *channels, merged) for merged in _merging(geometry)],
        work(geometry, *channels, other.merged),
        other,
        dtype.itemsize,
        facts.shared_memory,
    )
    if tile is None or not _keeps_to_a_group(tile, primitive, channels[0], geometry):
        return None
    sizes = [count for _, count in gather_tables.parities(geometry)] if transposed else [geometry.output_size]
    near = _is_near(tile, transposed, channels[0] if transposed else channels[1], geometry)
    return tile if near and descriptor_tables.covered(sizes, tile.box) else None


def _is_near(tile: descriptor_tables.Tile, transposed: bool, channels: int, geometry: Geometry) -> bool:
    """Whether the rows of a box are written no farther apart than 32-bit offsets reach."""
    _, height, width = geometry.input_size if transposed else geometry.output_size
    d, h, w = geometry.stride if transposed else (1, 1, 1)
    return max(tile.box) * (d * height * width + h * width + w) * channels < 2**31


def _merging(geometry: Geometry) -> tuple[bool, ...]:
    """Whether taps can be merged: there are none to merge, only merged ones, or both."""
    return (True,) if geometry.mixed else (False,) if geometry.coincident else (False, True)


def _keeps_to_a_group(tile: descriptor_tables.Tile, primitive: str, in_channels: int, geometry: Geometry) -> bool:
    """Whether no block of channels reaches into the next group."""
    return geometry.groups == 1 or (primitive == "conv" and in_channels // geometry.groups % tile.bk == 0)


def conv_tile(
    in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry
) -> descriptor_tables.Tile | None:
    """The heuristic's tile for :func:`conv`, or None where the gather GEMM suits better."""
    return _choose("conv", (in_channels, out_channels), dtype, geometry, device.current())


def input_grad_tile(
    in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry
) -> descriptor_tables.Tile | None:
    """The heuristic's tile for :func:`input_grad`, or None where the gather GEMM suits better."""
    return _choose("input_grad", (in_channels, out_channels), dtype, geometry, device.current())


def suits(primitive: str, data: Tensor, geometry: Geometry, in_channels: int, out_channels: int) -> bool:
    """Whether this kernel computes a primitive (``"conv"`` or ``"input_grad"``) of ``data`` here, and should."""
    if not available() or data.dtype.itemsize > 4 or data.numel() == 0:
        return False
    if device.exact(data.dtype):
        return False
    if repeats(data) if primitive == "input_grad" else not readable(data, geometry, geometry.groups):
        return False
    choose = conv_tile if primitive == "conv" else input_grad_tile
    return choose(in_channels, out_channels, data.dtype, geometry) is not None


def _run(launch, default, primitive: str, y: Tensor, sizes: tuple[int, int, int], geometry: Geometry) -> None:
    def candidates():
        every = descriptor_tables.all_tiles(y.dtype.itemsize, device.current().shared_memory)
        every = [tile for tile in every if _keeps_to_a_group(tile, primitive, sizes[1], geometry)]
        return [replace(tile, merged=merged) for merged in _merging(geometry) for tile in every]

    facts = {"primitive": primitive, "format": memory_format(y), "mixed": geometry.mixed}
    autotune.run(launch, default, candidates, descriptor_gemm_kernel, y, geometry, sizes, **facts)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, activation: str = "") -> Tensor:
    """``(N, C, D, H, W)`` and ``(O, C/groups, ku, kv)`` to ``(N, O, *geometry.output_size)``.

    The result has the input's dtype and memory format; sums, bias and activation are float32. To be called where
    :func:`suits` says so.
    """
    batch, out_channels = input.shape[0], weight.shape[0]
    shape = (batch, out_channels, *geometry.output_size)
    y = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    x, classes = in_classes(channels_last(input, geometry.groups), geometry.stride)

    def run(tile):
        plan = _forward_plan(geometry, x.shape[1], out_channels, tile, classes, unit(x.dtype), x.device)
        packed = packed_once(weight, geometry, plan.packing, tile)
        _launch(x, packed, bias, y, plan, tile, activation, strided=classes is not None)

    with device.of(x):
        channels = input.shape[1], out_channels
        _run(run, conv_tile(*channels, input.dtype, geometry), "conv", y, (batch, *channels), geometry)
    return y


def input_grad(grad_output: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(O, C/groups, ku, kv)`` to ``(N, C, *geometry.input_size)``.

    The result has the gradient's dtype and memory format. To be called where :func:`suits` says so.
    """
    batch, out_channels, channels = *grad_output.shape[:2], weight.shape[1] * geometry.groups
    shape = (batch, channels, *geometry.input_size)
    y = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(grad_output))
    g = channels_last(grad_output)

    def run(tile):
        plan = _input_grad_plan(geometry, channels, out_channels, tile, unit(g.dtype), g.device)
        _launch(g, pack(weight, plan.packing, tile.bk), None, y, plan, tile)

    with device.of(g):
        default = input_grad_tile(channels, out_channels, grad_output.dtype, geometry)
        _run(run, default, "input_grad", y, (batch, channels, out_channels), geometry)
    return y
