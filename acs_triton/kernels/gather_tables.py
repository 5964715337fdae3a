"""Tables that drive the gather GEMM: plain integers, no tensors.

The kernel multiplies gathered rows by packed weights. What it gathers is said here:

* A *job* is one tile of output columns: the channels of one view (forward), or of one parity
  class of positions (input gradient of a strided convolution). Where taps are *merged*, all views
  are one, with each position that they read once.
* A *step* is one block of ``bk`` channels at one tap: where it lies relative to a row (lower 32
  bits of its entry), and which validity bits it *needs* (upper 32 bits).
* An *axis entry* says, for one output index along one axis, where its row starts in the input,
  which validity bits are off there, and where it is written.

A row may be read at a step if none of the bits that the step needs is off for the row: one
instruction instead of comparing three coordinates. A bit stands for one tap position on one axis
(:data:`TAP_BITS` of them), or for the channels beyond the end of a window whose length is no
multiple of ``bk`` (:data:`TAIL_BITS`). Input offsets count vectors of 16 bytes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache

from ..geometry import MERGED, Geometry, Triple

TAP_BITS = 28
TAIL_BITS = (28, 29, 30)
JOB_FIELDS = 16
AXIS_FIELDS = 4


@dataclass(frozen=True)
class Region:
    """Output channels ``[first, end)``: of one channel group and of one view."""

    group: int
    view: int
    first: int
    end: int


@lru_cache(maxsize=1024)
def regions(geometry: Geometry, out_channels: int, merged: bool = False) -> tuple[Region, ...]:
    """Maximal runs of output channels that read the same input channels at the same positions.

    With ``merged`` taps, and for mixed views, every channel reads the positions of all views.
    """
    per_group = out_channels // geometry.groups
    if merged or geometry.mixed:
        views = ((MERGED, 0, out_channels),)
    elif geometry.coincident:
        views = ((geometry.views[0][0], 0, out_channels),)
    else:
        views = geometry.views
    result = []
    for view, first, end in views:
        for group in range(first // per_group, -(-end // per_group)):
            result.append(Region(group, view, max(first, group * per_group), min(end, (group + 1) * per_group)))
    return tuple(result)


def parity_taps(geometry: Geometry, view: int, parity: Triple) -> list[tuple[int, Triple]]:
    """Taps through which an output reads positions of one parity class ``position = q * stride + parity``.

    Returns pairs of the tap's number and the reading output's index, relative to ``q``.
    """
    result = []
    for number, tap in enumerate(geometry.taps(view)):
        distance = [r - t for r, t in zip(parity, tap, strict=True)]
        if not any(d % s for d, s in zip(distance, geometry.stride, strict=True)):
            result.append((number, tuple(d // s for d, s in zip(distance, geometry.stride, strict=True))))
    return result


def parities(geometry: Geometry) -> list[tuple[Triple, Triple]]:
    """Parity classes that have positions, each with its number of positions per axis."""
    result = []
    for parity in itertools.product(*map(range, geometry.stride)):
        count = tuple(-(-(n - r) // s) for n, r, s in zip(geometry.input_size, parity, geometry.stride, strict=True))
        if min(count) > 0:
            result.append((parity, count))
    return result


@lru_cache(maxsize=1024)
def tap_bits(geometry: Geometry, transposed: bool, merged: bool = False) -> int:
    """Validity bits that the forward pass (``transposed``: the input gradient) needs at most."""
    used = [MERGED] if merged or geometry.mixed else [view for view, _, _ in geometry.views]
    if transposed:
        groups = [
            (count, (1, 1, 1), geometry.output_size, [o for v in used for _, o in parity_taps(geometry, v, parity)])
            for parity, count in parities(geometry)
        ]
    else:
        groups = [(geometry.output_size, geometry.stride, geometry.input_size, geometry.taps(v)) for v in used]
    return max((len(_assign_bits(*group)) for group in groups), default=0)


def _assign_bits(count: Triple, stride: Triple, size: Triple, offsets: list[Triple]) -> dict[tuple[int, int], int]:
    """A bit for every ``(axis, offset)`` at which some row lies outside the tensor."""
    bits = {}
    for axis in range(3):
        for offset in sorted({offset[axis] for offset in offsets}):
            if offset < 0 or (count[axis] - 1) * stride[axis] + offset >= size[axis]:
                bits[axis, offset] = len(bits)
    return bits


@dataclass
class Tables:
    """Jobs, axis entries and steps, as flat lists; see the module's docstring.

    ``packed_steps[i]`` is the ``(group, tap, block)`` of weights that step ``i`` multiplies
    (input gradient only; the forward pass packs all taps and blocks in order).
    """

    jobs: list[int] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    packed_steps: list[tuple[int, int, int]] = field(default_factory=list)
    rows: int = 0
    """Largest number of rows of a job and sample."""

    @property
    def job_count(self) -> int:
        return len(self.jobs) // JOB_FIELDS

    @property
    def step_count(self) -> int:
        return len(self.steps)

    def add_axes(self, count, stride, size, strides, origin, write_stride, written, bits) -> int:
        """Axis entries of one view or parity class; returns where they start."""
        first = len(self.axes)
        pitch = (written[1] * written[2], written[2], 1)
        for axis in range(3):
            offsets = [(offset, 1 << bit) for (a, offset), bit in bits.items() if a == axis]
            for i in range(count[axis]):
                position = i * stride[axis]
                off = sum(mask for offset, mask in offsets if not 0 <= position + offset < size[axis])
                self.axes += (position * strides[axis], off, (i * write_stride[axis] + origin[axis]) * pitch[axis], 0)
        self.rows = max(self.rows, count[0] * count[1] * count[2])
        return first

    def add_step(self, offset: Triple, strides: Triple, channel: int, bits, tail: int | None) -> None:
        need = 0 if tail is None else 1 << TAIL_BITS[tail]
        for axis in range(3):
            if (axis, offset[axis]) in bits:
                need |= 1 << bits[axis, offset[axis]]
        position = sum(o * s for o, s in zip(offset, strides, strict=True)) + channel
        self.steps.append(need << 32 | position & 0xFFFFFFFF)

    def add_job(self, count, axes, step, steps, packed_step, packed_row, column, columns, tails) -> None:
        fields = [*count, axes, step, steps, packed_step, packed_row, column, columns, *tails]
        self.jobs += fields + [0] * (JOB_FIELDS - len(fields))

    def close(self) -> Tables:
        # The kernel loads a step ahead of its use, past the last one.
        self.steps.append(0)
        return self


def forward(
    geometry: Geometry,
    in_channels: int,
    out_channels: int,
    bn: int,
    bk: int,
    strides,
    vector: int,
    merged: bool = False,
) -> Tables:
    """Tables of the convolution.

    Args:
        in_channels: of the input as it is read, each group padded to whole vectors.
        bn, bk: columns and channels of a tile.
        strides: of the input's axes ``D, H, W``, in vectors.
        vector: channels in a vector.
        merged: whether all channels take the merged taps; those of mixed views always do.
    """
    tables = Tables()
    per_group = in_channels // geometry.groups
    blocks = -(-per_group // bk)
    tail = (per_group - (blocks - 1) * bk) // vector
    row = 0
    view_tables = {}
    for region in regions(geometry, out_channels, merged):
        offsets = geometry.taps(region.view)
        if region.view not in view_tables:
            bits = _assign_bits(geometry.output_size, geometry.stride, geometry.input_size, offsets)
            axes = tables.add_axes(
                geometry.output_size,
                geometry.stride,
                geometry.input_size,
                strides,
                (0, 0, 0),
                (1, 1, 1),
                geometry.output_size,
                bits,
            )
            view_tables[region.view] = bits, axes
        bits, axes = view_tables[region.view]
        first = tables.step_count
        for offset, block in itertools.product(offsets, range(blocks)):
            channel = (region.group * per_group + block * bk) // vector
            ragged = block == blocks - 1 and tail * vector < bk
            tables.add_step(offset, strides, channel, bits, 0 if ragged else None)
        for column in range(region.first, region.end, bn):
            steps = len(offsets) * blocks
            columns = min(bn, region.end - column)
            tables.add_job(geometry.output_size, axes, first, steps, 0, row, column, columns, (tail, 0, 0))
            row += bn
    return tables.close()


def packed_rows(geometry: Geometry, out_channels: int, bn: int, merged: bool = False) -> tuple[list[int], int]:
    """Row of each output channel in the forward pass's packed weights, and their number."""
    rows, first = [0] * out_channels, 0
    for region in regions(geometry, out_channels, merged):
        for channel in range(region.first, region.end):
            rows[channel] = first + channel - region.first
        first += -(-(region.end - region.first) // bn) * bn
    return rows, first


@dataclass(frozen=True)
class Window:
    """The whole vectors of gradient channels that cover a region: where it starts, and its blocks' number."""

    region: Region
    start: int
    length: int
    first_block: int
    blocks: int


@lru_cache(maxsize=1024)
def windows(
    geometry: Geometry, out_channels: int, bk: int, vector: int, merged: bool = False
) -> tuple[tuple[Window, ...], ...]:
    """Windows of each channel group. Channels of a neighbouring view in a window meet zero weights."""
    result = [[] for _ in range(geometry.groups)]
    for region in regions(geometry, out_channels, merged):
        group = result[region.group]
        start = region.first // vector * vector
        length = -(-region.end // vector) * vector - start
        block = group[-1].first_block + group[-1].blocks if group else 0
        group.append(Window(region, start, length, block, -(-length // bk)))
    return tuple(map(tuple, result))


def input_grad(
    geometry: Geometry,
    in_channels: int,
    out_channels: int,
    bn: int,
    bk: int,
    strides,
    vector: int,
    merged: bool = False,
) -> Tables:
    """Tables of the input gradient: rows are input positions, columns input channels, steps output channels.

    ``strides`` are those of the output gradient. Input positions fall into ``stride`` classes per
    axis by their remainder; each class has its own taps, so no product with zero is computed.
    """
    tables = Tables()
    per_group = in_channels // geometry.groups
    tiles = -(-per_group // bn)
    by_group = windows(geometry, out_channels, bk, vector, merged)
    views = sorted({region.view for region in regions(geometry, out_channels, merged)})
    for parity, count in parities(geometry):
        class_taps = {view: parity_taps(geometry, view, parity) for view in views}
        offsets = [offset for view in views for _, offset in class_taps[view]]
        bits = _assign_bits(count, (1, 1, 1), geometry.output_size, offsets)
        axes = tables.add_axes(
            count, (1, 1, 1), geometry.output_size, strides, parity, geometry.stride, geometry.input_size, bits
        )
        for group, group_windows in enumerate(by_group):
            first = tables.step_count
            tails = [0, 0, 0]
            for number, window in enumerate(group_windows):
                tail = window.length - (window.blocks - 1) * bk
                tails[number] = tail // vector
                for (tap, offset), block in itertools.product(class_taps[window.region.view], range(window.blocks)):
                    ragged = block == window.blocks - 1 and tail < bk
                    channel = (window.start + block * bk) // vector
                    tables.add_step(offset, strides, channel, bits, number if ragged else None)
                    tables.packed_steps.append((group, tap, window.first_block + block))
            for tile in range(tiles):
                column = group * per_group + tile * bn
                columns = min(bn, per_group - tile * bn)
                steps = tables.step_count - first
                tables.add_job(count, axes, first, steps, first, tile * bn, column, columns, tails)
    return tables.close()


def packed_channels(
    geometry: Geometry, out_channels: int, bk: int, vector: int, merged: bool = False
) -> tuple[list[int], int]:
    """Place of each output channel among the blocks of the input gradient's weights, and blocks per group."""
    by_group = windows(geometry, out_channels, bk, vector, merged)
    blocks = max(sum(window.blocks for window in group) for group in by_group)
    place = [0] * out_channels
    for number, group in enumerate(by_group):
        for window in group:
            first = (number * blocks + window.first_block) * bk
            for channel in range(window.region.first, window.region.end):
                place[channel] = first + channel - window.start
    return place, blocks
