"""Tables that drive the descriptor GEMM, and the choice of its tiles: plain integers, no tensors.

The kernel multiplies packed weights by boxes of positions that the copy engine (TMA) fetches by their
coordinates; what lies outside the tensor reads as zero, so there is nothing to mask. What it fetches
is said here:

* A *job* is one tile of output channels: of one view (forward), or of one parity class of positions
  (input gradient of a strided convolution). Where taps are *merged*, all views are one.
* A *segment* is a rectangle of taps, evenly spaced along two directions ``u`` and ``v``, and the
  channels read at each of them. A view is one segment, merged 3x3 taps are three.

The kernel counts a segment's steps and finds tap and channel from the count, by multiplications with
reciprocals: a loop that keeps coordinates up to date would carry three times as many values.

A convolution at a stride reads every second position (or fourth, ...). Along an axis these are one of as many
*classes* of positions, ``q * stride + remainder``; the descriptor's axes count ``q``, and its first one says which
class of which sample (:class:`Classes`). So the copy engine still fetches boxes without gaps.

Channels decide on the tile and its box, not the volume, so that one binary serves all volumes: their axes are put
in the order in which the boxes cover them with the least waste.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

from ..geometry import Geometry, Triple
from . import gather_tables, tiles

JOB_FIELDS = 16
SEGMENT_FIELDS = 24


@dataclass(frozen=True)
class Tile:
    """Output channels, box of positions and depth (channels read) of a tile; ``merged`` as in ``tiles.GemmTile``."""

    bo: int
    box: Triple
    bk: int
    num_warps: int
    num_stages: int
    merged: bool = False


LARGE_BOX, SMALL_BOX = (4, 8, 8), (4, 4, 8)

SHAPES = ((64, LARGE_BOX), (128, SMALL_BOX), (64, SMALL_BOX))
"""Output channels and boxes of the tiles, those that need the fewest instructions and loads first.

They have 128 accumulators a thread of four warps at most. The last is for 32-bit values: there are too few registers
to store more of them."""

PRODUCT_BYTES = 4096
"""Of one operand, times the rows of the other, that a multiprocessor of an H100 multiplies in a clock."""

LOADED_BYTES = 64
"""That one reads from the L2 cache in a clock."""

MOST_WORK = 1.25
"""Cost that a descriptor tile may have as a multiple of the gather GEMM's.

It executes less than half of the instructions for the same product."""

MOST_POSITIONS = 2.5
"""Positions that the boxes may have as a multiple of the volume's."""

FEW_POSITIONS = 2048
"""Volumes with no more than these are covered as they may be: their weights take longer than their positions."""


def axis_order(size: Triple, box: Triple) -> Triple:
    """The order of the axes in which boxes cover ``size`` with the least waste; the natural one of equals."""

    def boxes(order: Triple) -> int:
        return box_count(size, box, order)

    return min(itertools.permutations(range(3)), key=boxes)


def box_count(size: Triple, box: Triple, order: Triple) -> int:
    """Boxes that cover ``size`` with its axes in this order."""
    return prod(-(-size[axis] // extent) for axis, extent in zip(order, box, strict=True))


@dataclass(frozen=True)
class Classes:
    """Where the classes of positions begin that a convolution at a stride reads.

    Attributes:
        stride: per axis, powers of two.
        sample: from a sample to the next, in units that address all classes of all samples.
        pitch: per axis, from a position to the next in these units; 0 where the stride is 1.
    """

    stride: Triple
    sample: int
    pitch: Triple

    def of(self, position: Triple) -> tuple[int, Triple]:
        """The class of a position relative to ``output index * stride``, and the position's place in it."""
        first = sum(p % s * pitch for p, s, pitch in zip(position, self.stride, self.pitch, strict=True))
        return first, tuple(p // s for p, s in zip(position, self.stride, strict=True))


def has_classes(geometry: Geometry) -> bool:
    """Whether a convolution's stride is one for :class:`Classes`: powers of two, and classes of equal sizes."""
    sizes = zip(geometry.stride, geometry.input_size, strict=True)
    return all(stride & (stride - 1) == 0 and size % stride == 0 for stride, size in sizes)


@dataclass(frozen=True)
class Grid:
    """Taps ``first + i * v + j * u``, with ``i`` below ``row`` running first; numbered from ``number``."""

    number: int
    count: int
    row: int
    first: Triple
    v: Triple
    u: Triple


def _minus(a: Triple, b: Triple) -> Triple:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def grids(taps: Sequence[Triple]) -> list[Grid]:
    """Runs of consecutive taps that are evenly spaced along two directions, each as long as possible."""
    result, number = [], 0
    while number < len(taps):
        left = list(taps[number:])
        v = _minus(left[1], left[0]) if len(left) > 1 else (0, 0, 0)
        row = 1
        while row < len(left) and _minus(left[row], left[row - 1]) == v:
            row += 1
        rows = [left[i : i + row] for i in range(0, len(left) - row + 1, row)]
        first, u, count = rows[0], (0, 0, 0), 1
        if row > 1 and len(rows) > 1:
            u = _minus(rows[1][0], first[0])
            while count < len(rows) and rows[count] == [
                tuple(p + count * d for p, d in zip(tap, u, strict=True)) for tap in first
            ]:
                count += 1
        result.append(Grid(number, row * count, row, first[0], v, u))
        number += row * count
    return result


def reciprocal(divisor: int, of_twice: bool) -> int:
    """``r`` with ``n // divisor == (n * r) >> 32`` for ``n < 2**31 // divisor``, as a signed 32-bit number.

    ``of_twice``: the factor is ``2 * n``, so that there is one for the divisor 1 too.
    """
    r = -(-(2**31 if of_twice else 2**32) // divisor)
    return r - 2**32 if r >= 2**31 else r


@dataclass
class Tables:
    """Jobs and segments, as flat lists, with the axes in ``order``.

    ``packed_steps`` as in :class:`acs_triton.kernels.gather_tables.Tables`; ``classes`` at a stride only.
    """

    tile: Tile
    order: Triple
    classes: Classes | None = None
    jobs: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    packed_steps: list[tuple[int, int, int]] = field(default_factory=list)
    boxes: int = 0
    """Largest number of boxes of a job and sample."""

    @property
    def job_count(self) -> int:
        return len(self.jobs) // JOB_FIELDS

    @property
    def segment_count(self) -> int:
        return len(self.segments) // SEGMENT_FIELDS

    def _ordered(self, triple: Triple) -> Triple:
        return tuple(triple[axis] for axis in self.order)

    def add_segments(self, taps: Sequence[Triple], channel: int, blocks: int) -> None:
        """Segments of taps with ``blocks`` blocks of channels from ``channel`` on at each."""
        for grid in grids(taps):
            u = _minus(grid.u, _times(grid.v, grid.row))  # a new row is that far from one more step along v
            fields = [*itertools.chain(*map(self._ordered, (grid.first, grid.v, u))), channel, -blocks * self.tile.bk]
            rows = reciprocal(grid.row, False) if grid.count > grid.row else 0
            fields += [reciprocal(blocks, True), rows, 2 * grid.count * blocks]
            if self.classes is not None:
                shifts = tuple(stride.bit_length() - 1 for stride in self.classes.stride)
                fields += [*self._ordered(shifts), *self._ordered(self.classes.pitch), self.classes.sample]
            self.segments += fields + [0] * (SEGMENT_FIELDS - len(fields))

    def add_jobs(self, first_segment, packed_row, channels, size, written, stride=(1, 1, 1), origin=(0, 0, 0)) -> None:
        """Jobs of the output channels ``channels`` (first and end) at ``size`` positions.

        They are written ``stride`` apart from ``origin`` on in an output of the size ``written``. The weights of
        the tile's first step begin at ``packed_row``; each tile has the next rows.
        """
        pitch = (written[1] * written[2], written[2], 1)
        counts = [-(-n // b) for n, b in zip(self._ordered(size), self.tile.box, strict=True)]
        steps = self._ordered(tuple(s * p for s, p in zip(stride, pitch, strict=True)))
        start = sum(o * p for o, p in zip(origin, pitch, strict=True))
        all_steps = sum(self.segments[SEGMENT_FIELDS * first_segment + 13 :: SEGMENT_FIELDS]) // 2
        for number, column in enumerate(range(*channels, self.tile.bo)):
            row = packed_row + number * self.tile.bo
            columns = min(self.tile.bo, channels[1] - column)
            fields = [first_segment, self.segment_count - first_segment, row, column, columns]
            fields += [*self._ordered(size), *counts, *steps, start, all_steps]
            self.jobs += fields + [0] * (JOB_FIELDS - len(fields))
        self.boxes = max(self.boxes, prod(counts))


def _times(triple: Triple, factor: int) -> Triple:
    return tuple(value * factor for value in triple)


def forward(
    geometry: Geometry, in_channels: int, out_channels: int, tile: Tile, classes: Classes | None = None
) -> Tables:
    """Tables of the convolution; ``in_channels`` as the input is read, each group in whole vectors."""
    size = geometry.output_size
    tables = Tables(tile, axis_order(size, tile.box), classes)
    per_group, row = in_channels // geometry.groups, 0
    for region in gather_tables.regions(geometry, out_channels, tile.merged):
        first = tables.segment_count
        tables.add_segments(geometry.taps(region.view), region.group * per_group, -(-per_group // tile.bk))
        tables.add_jobs(first, row, (region.first, region.end), size, size)
        row += -(-(region.end - region.first) // tile.bo) * tile.bo
    return tables


def input_grad(geometry: Geometry, in_channels: int, out_channels: int, tile: Tile, vector: int) -> Tables:
    """Tables of the input gradient: positions of the input, steps over output channels from whole vectors on."""
    largest = max(parity[1] for parity in gather_tables.parities(geometry))
    tables = Tables(tile, axis_order(largest, tile.box))
    per_group = in_channels // geometry.groups
    packed_rows = -(-per_group // tile.bo) * tile.bo
    for parity, count in gather_tables.parities(geometry):
        for group, windows in enumerate(gather_tables.windows(geometry, out_channels, tile.bk, vector, tile.merged)):
            first, packed = tables.segment_count, len(tables.packed_steps)
            for window in windows:
                taps = gather_tables.parity_taps(geometry, window.region.view, parity)
                tables.add_segments([offset for _, offset in taps], window.start, window.blocks)
                for (tap, _), block in itertools.product(taps, range(window.blocks)):
                    tables.packed_steps.append((group, tap, window.first_block + block))
            channels = group * per_group, (group + 1) * per_group
            tables.add_jobs(first, packed * packed_rows, channels, count, geometry.input_size, geometry.stride, parity)
    return tables


@dataclass(frozen=True)
class Work:
    """What a primitive multiplies at each position: channels written in each run, and channels read at all taps.

    ``depths`` are the taps and the channels read at each of them, of every window.
    """

    columns: tuple[int, ...]
    depths: tuple[tuple[int, int], ...]
    merged: bool

    def depth(self, itemsize: int) -> int:
        """Channels of a tile's step that cover what is read at the least cost."""
        sizes = tiles._depths(itemsize, False)
        return tiles._cheapest([channels for _, channels in self.depths], sizes, tiles.STEP_OVERHEAD)

    def cost(self, positions: int, columns: int, itemsize: int) -> float:
        """Clocks of a multiprocessor for a position, channels that fill up tiles included.

        Those of products or of loads, whichever takes longer.

        Args:
            positions, columns: of a tile.
            itemsize: bytes of an element.
        """
        depth = self.depth(itemsize)
        steps = sum(taps * -(-channels // depth) for taps, channels in self.depths)
        products = positions * columns * depth * itemsize / PRODUCT_BYTES
        loads = (positions + columns) * depth * itemsize / LOADED_BYTES
        return sum(-(-width // columns) for width in self.columns) * steps * max(products, loads) / positions


def covered(sizes: Sequence[Triple], box: Triple) -> bool:
    """Whether boxes cover classes of positions of these sizes well enough, axes in the order of the tables."""
    order = axis_order(max(sizes), box)
    boxes = sum(box_count(size, box, order) for size in sizes)
    few = prod(max(sizes)) <= FEW_POSITIONS
    return few or boxes * prod(box) <= MOST_POSITIONS * sum(map(prod, sizes))


@lru_cache(maxsize=4096)
def forward_work(geometry: Geometry, in_channels: int, out_channels: int, merged: bool) -> Work:
    """:class:`Work` of the convolution."""
    regions = gather_tables.regions(geometry, out_channels, merged)
    columns = tuple(region.end - region.first for region in regions)
    taps = len(geometry.taps(regions[0].view))
    return Work(columns, ((taps, in_channels // geometry.groups),), merged)


@lru_cache(maxsize=4096)
def input_grad_work(geometry: Geometry, in_channels: int, out_channels: int, merged: bool) -> Work:
    """:class:`Work` of the input gradient."""
    regions = gather_tables.regions(geometry, out_channels, merged)
    depths = tuple((len(geometry.taps(region.view)), region.end - region.first) for region in regions)
    columns = (in_channels // geometry.groups,) * geometry.groups
    return Work(columns, depths, merged)


def choose(
    works: Sequence[Work], gathered: Work, other: tiles.GemmTile, itemsize: int, shared_memory: int
) -> Tile | None:
    """The tile for a primitive, or None where the gather GEMM takes less time by this estimate.

    Args:
        works: without and with merged taps; one of them where there is no choice.
        gathered, other: what the gather GEMM computes, and its tile.
        itemsize: bytes of an element.
        shared_memory: bytes that a program may use.
    """

    def cost(candidate) -> float:
        work, (bo, box) = candidate
        return work.cost(prod(box), bo, itemsize)

    best = min(((work, shape) for work in works for shape in _shapes(work.depth(itemsize), itemsize)), key=cost)
    work, (bo, box) = best
    if cost(best) > MOST_WORK * gathered.cost(other.bm, other.bn, itemsize):
        return None
    return _tile(bo, box, work.depth(itemsize), itemsize, shared_memory, work.merged)


def _shapes(bk: int, itemsize: int) -> list[tuple[int, Triple]]:
    shapes = SHAPES[:2] if itemsize == 2 else SHAPES[1:]
    return [(bo, box) for bo, box in shapes if bo == 64 or bk * itemsize == 128]  # few serve all layers


def _tile(bo: int, box: Triple, bk: int, itemsize: int, shared_memory: int, merged: bool = False) -> Tile:
    stages = tiles._stages((bo + prod(box)) * bk * itemsize, shared_memory)
    return Tile(bo, box, bk, tiles.WARPS, stages, merged)


def all_tiles(itemsize: int, shared_memory: int) -> list[Tile]:
    """Every tile that :func:`choose` can give for a dtype and device, taps not merged."""
    depths = tiles._depths(itemsize, False)
    return [_tile(*shape, bk, itemsize, shared_memory) for bk in depths for shape in _shapes(bk, itemsize)]
