"""Weight gradient, for GPUs with a copy engine (TMA) and 16-bit dtypes.

The same product, split and reduction as :mod:`acs_triton.kernels.weight_grad`. Here the copy engine
fetches the boxes of positions: it fills what lies outside the tensors with zeros, so that a step has
neither addresses nor masks, and the registers that these take in the other kernel go to a tile of
twice its output channels.

A row of positions along one axis is taken where it covers the volume as well as a cube does: matrix
instructions then read both operands from shared memory, where a cube's left one passes through registers.

Non-finite values: positions beyond the end of the output count as zeros, which an infinite or NaN
input turns into NaN also at taps that do not read it. Results of finite operands are not affected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Geometry, Triple
from ..tables import keep
from . import autotune, device, gather_tables, tiles
from . import weight_grad as gathered
from .channels_last import channels_last, unit
from .descriptor_tables import LOADED_BYTES, PRODUCT_BYTES, Classes, axis_order, box_count, covered
from .descriptors import available, descriptor, in_classes, readable, repeats

JOB_FIELDS = tl.constexpr(21)  # head and taps
HEAD_FIELDS = tl.constexpr(6)
TAP_FIELDS = tl.constexpr(5)

ROW, CUBE = (1, 1, 64), (4, 4, 4)
TAPS = 3
INPUT_CHANNELS, OUTPUT_CHANNELS = 64, 64

WAIT = 64
"""Clocks between matrix instructions whose left operand passes through the same registers."""


@dataclass(frozen=True)
class Tile:
    """Input channels, output channels and box of positions of a tile; ``taps`` tiles share a program."""

    bc: int
    bo: int
    box: Triple
    taps: int
    num_warps: int
    num_stages: int


# Sizes are no constants and not specialised on: one binary serves every volume.
@triton.jit(
    do_not_specialize=[
        "jobs", "steps", "steps_per_split", "boxes1", "boxes2", "boxes3",
        "first_channel", "channels", "out_channel", "out_split",
    ],
    do_not_specialize_on_alignment=["p_jobs"],
)  # fmt: skip
def descriptor_weight_grad_kernel(
    g,  # descriptor of the output gradient (samples, three axes, channels), boxes (1, B1, B2, B3, BO)
    x,  # descriptor of the input (samples and classes, three axes, channels), boxes (1, B1, B2, B3, BC)
    p_out,  # partial sums (splits, O, taps, channels)
    p_jobs,
    jobs,
    steps,
    steps_per_split,
    boxes1,
    boxes2,
    boxes3,
    first_channel,
    channels,
    out_channel,
    out_split,
    B1: tl.constexpr,
    B2: tl.constexpr,
    B3: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    STRIDED: tl.constexpr,  # whether the input's positions are in classes
):
    BK: tl.constexpr = B1 * B2 * B3
    program = tl.program_id(0)
    p_job = p_jobs + (program % jobs) * JOB_FIELDS
    split = program // jobs
    step = split * steps_per_split
    count = tl.minimum(steps_per_split, steps - step)
    end1 = boxes1 * B1
    end2 = boxes2 * B2
    end3 = boxes3 * B3
    i3 = step % boxes3 * B3
    step = step // boxes3
    i2 = step % boxes2 * B2
    step = step // boxes2
    i1 = step % boxes1 * B1
    n = step // boxes1

    first_o = tl.load(p_job)
    first_c = tl.load(p_job + 1)
    p_tap0 = p_job + HEAD_FIELDS
    p_tap1 = p_tap0 + TAP_FIELDS
    p_tap2 = p_tap1 + TAP_FIELDS
    at1 = tl.load(p_tap0)
    at2 = tl.load(p_tap0 + 1)
    at3 = tl.load(p_tap0 + 2)
    at0 = tl.load(p_tap0 + 4)
    pitch = tl.load(p_job + 5)
    acc0 = tl.zeros((BC, BO), tl.float32)
    if TAPS == 3:
        by1 = tl.load(p_tap1)
        by2 = tl.load(p_tap1 + 1)
        by3 = tl.load(p_tap1 + 2)
        by0 = tl.load(p_tap1 + 4)
        to1 = tl.load(p_tap2)
        to2 = tl.load(p_tap2 + 1)
        to3 = tl.load(p_tap2 + 2)
        to0 = tl.load(p_tap2 + 4)
        acc1 = tl.zeros((BC, BO), tl.float32)
        acc2 = tl.zeros((BC, BO), tl.float32)
    for _ in range(count):
        b_g = g.load([n, i1, i2, i3, first_o]).reshape(BK, BO)
        b_x0 = x.load([_place(n, pitch, at0, STRIDED), i1 + at1, i2 + at2, i3 + at3, first_c]).reshape(BK, BC)
        if UPCAST:
            b_g = b_g.to(tl.float32)
            b_x0 = b_x0.to(tl.float32)
        acc0 = tl.dot(b_x0.T, b_g, acc0, input_precision=PRECISION)
        if TAPS == 3:
            b_x1 = x.load([_place(n, pitch, by0, STRIDED), i1 + by1, i2 + by2, i3 + by3, first_c]).reshape(BK, BC)
            b_x2 = x.load([_place(n, pitch, to0, STRIDED), i1 + to1, i2 + to2, i3 + to3, first_c]).reshape(BK, BC)
            if UPCAST:
                b_x1 = b_x1.to(tl.float32)
                b_x2 = b_x2.to(tl.float32)
            acc1 = tl.dot(b_x1.T, b_g, acc1, input_precision=PRECISION)
            acc2 = tl.dot(b_x2.T, b_g, acc2, input_precision=PRECISION)

        i3 += B3
        over = i3 >= end3
        i3 = tl.where(over, 0, i3)
        i2 += tl.where(over, B2, 0)
        over = i2 >= end2
        i2 = tl.where(over, 0, i2)
        i1 += tl.where(over, B1, 0)
        over = i1 >= end1
        i1 = tl.where(over, 0, i1)
        n += tl.where(over, 1, 0)

    o = first_o + tl.arange(0, BO)
    c = tl.load(p_job + 2) + tl.arange(0, BC)  # of the group
    m_out = ((o >= tl.load(p_job + 3)) & (o < tl.load(p_job + 4)))[None, :] & ((c >= 0) & (c < channels))[:, None]
    p_out += split.to(tl.int64) * out_split + ((o - first_channel) * out_channel)[None, :] + c[:, None]
    tl.store(p_out + tl.load(p_tap0 + 3) * channels, acc0, mask=m_out)
    if TAPS == 3:
        tap = tl.load(p_tap1 + 3)
        tl.store(p_out + tap * channels, acc1, mask=m_out & (tap >= 0))
        tap = tl.load(p_tap2 + 3)
        tl.store(p_out + tap * channels, acc2, mask=m_out & (tap >= 0))


@triton.jit
def _place(n, pitch, of_class, STRIDED: tl.constexpr):
    """Of a sample's boxes on the input's first axis."""
    return n * pitch + of_class if STRIDED else n


def tile_jobs(geometry, in_channels: int, out_channels: int, tile: Tile, order: Triple, vector: int, classes):
    """Per tile of columns: its first and end output channel, and its jobs' fields."""
    classes = classes or Classes((1, 1, 1), 1, (0, 0, 0))
    per_group = in_channels // geometry.groups
    for region in gather_tables.regions(geometry, out_channels):
        positions = geometry.taps(region.view)
        rows = []
        for numbers, _ in gathered.tap_rows(positions, tile.taps):
            fields = []
            for tap in numbers:
                place, position = classes.of(positions[tap])
                fields += [*(position[axis] for axis in order), tap, place]
            rows.append(fields + [0, 0, 0, -1, 0] * (TAPS - len(numbers)))
        channel = region.group * per_group
        for start in range(region.first // vector * vector, region.end, tile.bo):
            first, end = max(region.first, start), min(region.end, start + tile.bo)
            starts = range(channel // vector * vector, channel + per_group, tile.bc)
            head = [first, end, classes.sample]
            yield first, end, [[start, c, c - channel, *head, *row] for c in starts for row in rows]


@keep(maxsize=512)
def _plan(geometry, in_channels, out_channels, tile, order, classes, vector, where) -> tuple[gathered.Chunk, ...]:
    row_bytes = in_channels // geometry.groups * math.prod(geometry.kernel_size) * torch.float32.itemsize
    jobs = tile_jobs(geometry, in_channels, out_channels, tile, order, vector, classes)
    return gathered.chunks(jobs, row_bytes, tile.bo, where)


def _launch(g: Tensor, x: Tensor, out: Tensor, geometry: Geometry, tile: Tile) -> None:
    out_channels, channels, *kernel = out.shape
    taps, size = math.prod(kernel), geometry.output_size
    order = axis_order(size, tile.box)
    boxes = [-(-size[axis] // extent) for axis, extent in zip(order, tile.box, strict=True)]
    steps = g.shape[0] * math.prod(boxes)
    x, classes = in_classes(x, geometry.stride)
    shape = channels * geometry.groups, out_channels
    for chunk in _plan(geometry, *shape, tile, order, classes, unit(x.dtype), x.device):
        elements = (chunk.end_channel - chunk.first_channel) * taps * channels
        jobs = chunk.jobs.shape[0]
        most = tiles.MAX_WORKSPACE // (elements * torch.float32.itemsize)
        per_split = tiles.steps_per_split(jobs, steps, most, device.current().multiprocessors)
        splits = triton.cdiv(steps, per_split)
        partial = torch.empty((splits, elements), dtype=torch.float32, device=x.device)
        descriptor_weight_grad_kernel[(jobs * splits,)](
            descriptor(g, order, tile.box, tile.bo),
            descriptor(x, order, tile.box, tile.bc),
            partial,
            chunk.jobs,
            jobs,
            steps,
            per_split,
            *boxes,
            chunk.first_channel,
            channels,
            taps * channels,
            elements,
            B1=tile.box[0],
            B2=tile.box[1],
            B3=tile.box[2],
            BC=tile.bc,
            BO=tile.bo,
            TAPS=tile.taps,
            PRECISION=device.dot_precision(x.dtype),
            UPCAST=device.upcast(x.dtype),
            STRIDED=classes is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        gathered.add_splits_kernel[(triton.cdiv(elements, 512),)](
            partial,
            out[chunk.first_channel : chunk.end_channel],
            None,
            0,
            splits,
            taps,
            taps,
            channels,
            elements,
            elements,
            BLOCK=512,
            MERGED=False,
        )


def _cost(columns, group_in: int, rows: int, bc: int, bo: int, bk: int, taps: int, wait: int) -> float:
    """Clocks of a multiprocessor for a position, channels that fill up tiles included.

    Those of products or of loads, whichever takes longer. ``wait`` clocks pass after each matrix instruction, which
    two programs share.
    """
    programs = sum(-(-width // bo) for width in columns) * -(-group_in // bc) * rows
    products = taps * bc * bo * bk * 2 / PRODUCT_BYTES + taps * (bk // 16) * wait / 2
    loads = (taps * bc + bo) * bk * 2 / LOADED_BYTES
    return programs * max(products, loads) / bk


def all_tiles(shared_memory: int) -> list[Tile]:
    """Every tile that the heuristic can choose on a device."""
    return [_tile(box, taps, shared_memory) for box, taps in ((ROW, TAPS), (CUBE, TAPS), (CUBE, 1))]


def _tile(box: Triple, taps: int, shared_memory: int) -> Tile:
    stages = tiles._stages(2 * (taps * INPUT_CHANNELS + OUTPUT_CHANNELS) * math.prod(box), shared_memory)
    return Tile(INPUT_CHANNELS, OUTPUT_CHANNELS, box, taps, tiles.WARPS, stages)


@lru_cache(maxsize=4096)
def _choose(in_channels: int, out_channels: int, dtype, geometry: Geometry, facts) -> Tile | None:
    columns = [region.end - region.first for region in gather_tables.regions(geometry, out_channels)]
    group_in, taps = in_channels // geometry.groups, TAPS if math.prod(geometry.kernel_size) > 1 else 1
    rows = len(gathered.tap_rows(geometry.taps(geometry.views[0][0]), taps))
    other = gathered.weight_grad_tile(in_channels, out_channels, dtype, geometry)
    other_columns, other_rows = columns, rows
    if other.merged:
        other_columns = [out_channels // geometry.groups] * geometry.groups
        other_rows = len(gathered.tap_rows(geometry.merged.positions, other.taps))
    limit = _cost(other_columns, group_in, other_rows, other.bc, other.bo, other.bk, other.taps, 0)
    cost = _cost(columns, group_in, rows, INPUT_CHANNELS, OUTPUT_CHANNELS, math.prod(CUBE), taps, WAIT)
    box = ROW if taps > 1 and _in_rows(geometry.output_size) else CUBE
    if cost > limit or not covered([geometry.output_size], box):
        return None
    return _tile(box, taps, facts.shared_memory)


def _in_rows(size: Triple) -> bool:
    """Whether rows of positions cover a volume as well as cubes, waiting included: those of large volumes only."""
    rows, cubes = (box_count(size, box, axis_order(size, box)) for box in (ROW, CUBE))
    return max(size) >= max(ROW) and 2 * rows <= 3 * cubes


def weight_grad_tile(in_channels: int, out_channels: int, dtype: torch.dtype, geometry: Geometry) -> Tile | None:
    """The heuristic's tile for :func:`weight_grad`, or None where the other kernel has less to do."""
    return _choose(in_channels, out_channels, dtype, geometry, device.current())


def suits(grad_output: Tensor, input: Tensor, geometry: Geometry) -> bool:
    """Whether this kernel computes a weight gradient here, and should."""
    if not available() or input.dtype.itemsize != 2 or 0 in (grad_output.numel(), input.numel()):
        return False
    if geometry.mixed or repeats(grad_output) or not readable(input, geometry):
        return False
    return weight_grad_tile(input.shape[1], grad_output.shape[1], input.dtype, geometry) is not None


def weight_grad(grad_output: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """``(N, O, *geometry.output_size)`` and ``(N, C, *geometry.input_size)`` to ``(O, C/groups, ku, kv)``.

    The result has the gradient's dtype; sums are float32 and repeat bit by bit. To be called where :func:`suits` says
    so.
    """
    out_channels, (batch, in_channels) = grad_output.shape[1], input.shape[:2]
    shape = (out_channels, in_channels // geometry.groups, *geometry.kernel_size)
    out = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device)
    g, x = channels_last(grad_output), channels_last(input)
    with device.of(x):
        default = weight_grad_tile(in_channels, out_channels, x.dtype, geometry)

        def candidates():
            return [tile for tile in all_tiles(device.current().shared_memory) if tile.taps == default.taps]

        channels = batch, in_channels, out_channels
        launch = partial(_launch, g, x, out, geometry)
        autotune.run(launch, default, candidates, descriptor_weight_grad_kernel, out, geometry, channels)
    return out
