"""Work of the matrix kernels: the gather and the descriptor GEMM, and the weight gradients."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from acs_triton.kernels import descriptor_tables, descriptor_weight_grad, gather_tables, weight_grad

from .launches import distinct_bytes, spanned
from .traffic import (
    LANES,
    SECTOR,
    VECTOR,
    Arguments,
    Work,
    by_block,
    distinct,
    one_by_one,
    request_sectors,
    sectors_of,
    touched_sectors,
)

_HEAD, _TAP = weight_grad.HEAD_FIELDS.value, weight_grad.TAP_FIELDS.value
_FETCHED = descriptor_weight_grad.TAP_FIELDS.value


def gathered_gemm(a: Arguments, programs: int) -> Work:
    item, lanes = a.p_x.element_size(), a.BK // a.UNIT
    axes, steps = a.table("p_axes", gather_tables.AXIS_FIELDS), a.table("p_steps")
    seen = {length: np.zeros(-(-spanned(a.p_x) // a.UNIT), bool) for length in range(1, lanes + 1)}
    rows_of, gathered = {}, {}
    matrix = loaded = stored = 0
    for job in a.table("p_jobs", gather_tables.JOB_FIELDS):
        *size, axis, step, n_steps, _, _, column, columns = (int(value) for value in job[:10])
        loaded += SECTOR * (programs // a.jobs)  # the job's sizes
        key = (*size, axis)
        if key not in rows_of:
            rows_of[key] = _rows(a, axes, size, axis // gather_tables.AXIS_FIELDS)
        tiles, o_x, off, y_row, entries = rows_of[key]
        matrix += tiles * n_steps * a.BM * a.BN * a.BK
        loaded += tiles * n_steps * a.BN * a.BK * item  # weights
        loaded += a.splits * (tiles * SECTOR + entries)  # the rest of the job, and the rows
        for first, n in _splits(n_steps, a.splits):
            loaded += tiles * SECTOR * int(sectors_of((step + first) * 8, (n + 1) * 8))
        loaded += tiles * SECTOR * int(sectors_of(column * item, columns * item)) * _biased(a)
        if (key, step, n_steps) not in gathered:
            total = 0
            for entry in steps[step : step + n_steps]:
                offset, need = int(entry.astype(np.int32)), int(entry) >> 32
                tail = [i for i, bit in enumerate(gather_tables.TAIL_BITS) if need >> bit & 1]
                length = int(job[10 + tail[0]]) if tail else lanes
                valid = (off & need & ((1 << gather_tables.TAP_BITS) - 1)) == 0
                start = o_x + offset
                total += request_sectors(start * VECTOR, length * VECTOR, valid, LANES // lanes)
                seen[length][start[valid]] = True
            gathered[key, step, n_steps] = total * SECTOR
        loaded += gathered[key, step, n_steps]
        stored += _stored(a, y_row, column, columns, a.BN)
    touched = np.zeros_like(seen[1])
    for length, starts in seen.items():
        for vector in range(length):
            touched[vector:] |= starts[: starts.size - vector]
    tables = a.size("p_w", "p_jobs", "p_axes", "p_steps") + a.size("p_bias") * _biased(a)
    written = _written(a, a.table("p_jobs", gather_tables.JOB_FIELDS)[:, 9])
    return Work(matrix, 0, loaded, stored, int(touched.sum()) * VECTOR + tables, written)


def _splits(steps: int, splits: int) -> list[tuple[int, int]]:
    """First step and number of steps of each split, as the kernels find them."""
    each = -(-steps // splits)
    return [(first, min(each, steps - first)) for first in (min(i * each, steps) for i in range(splits))]


def _biased(a: Arguments) -> bool:
    return bool(a.biased) and a.splits == 1


def _written(a: Arguments, columns: np.ndarray) -> int:
    """Bytes that a GEMM writes: the output, or the sums of each split; ``columns`` of its different tiles."""
    if a.splits == 1:
        return a.size("p_y")
    return a.splits * a.p_sums.shape[1] * int(_sum_bytes(a, columns).sum())


def _sum_bytes(a: Arguments, columns):
    """Bytes of a row's sums: whole vectors of four."""
    return -(-columns // 4) * 4 * a.p_sums.element_size()


def _rows(a: Arguments, axes: np.ndarray, size: list[int], first: int):
    """Tiles of a job's rows; each row's input offset, bits that are off, output row (-1: none); bytes of entries."""
    rows = a.samples * size[0] * size[1] * size[2]
    tiles = -(-rows // a.BM)
    row = np.minimum(np.arange(tiles * a.BM), rows - 1)
    sample, index = row, []
    for n in reversed(size):
        index.append(sample % n)
        sample = sample // n
    o_x, off, y_row, entries = sample * a.x_sample, 0, sample * a.y_positions, 0
    for axis, i in enumerate(reversed(index)):
        entry = first + sum(size[:axis]) + i
        o_x, off, y_row = o_x + axes[entry, 0], off | axes[entry, 1], y_row + axes[entry, 2]
        # Two entries share a sector.
        sectors = np.sort((entry // 2).reshape(tiles, a.BM), axis=1)
        entries += SECTOR * (tiles + np.count_nonzero(np.diff(sectors, axis=1)))
    return tiles, o_x, off, np.where(np.arange(row.size) < rows, y_row, -1), entries


def _stored(a: Arguments, y_row: np.ndarray, column: int, columns: int, width: int) -> int:
    """Bytes of the sectors of a tile's stores to these rows (-1: none); ``width``: of the whole tile."""
    item, valid = a.p_y.element_size(), y_row >= 0
    if a.splits > 1:
        return a.splits * int(valid.sum()) * SECTOR * int(sectors_of(0, _sum_bytes(a, columns)))
    if not a.Y_UNIT:
        start = y_row // a.y_positions * (a.y_channels - 1) * a.y_positions + y_row
        return one_by_one(start, valid, np.arange(column, column + columns) * a.y_positions, item)
    chunk = LANES * a.Y_UNIT  # columns that a request can take
    return SECTOR * sum(
        request_sectors(
            (y_row * a.y_channels + column + first) * item,
            min(columns - first, chunk) * item,
            valid,
            max(1, chunk // width),
        )
        for first in range(0, columns, chunk)
    )


def fetched_gemm(a: Arguments, programs: int) -> Work:
    item, extents = a.x.base.element_size(), (a.B1, a.B2, a.B3)
    segments = a.table("p_segments", descriptor_tables.SEGMENT_FIELDS)
    boxes: dict[tuple, _Boxes] = {}
    fetched: dict[tuple, int] = {}
    matrix = loaded = stored = 0
    for job in a.table("p_jobs", descriptor_tables.JOB_FIELDS).tolist():
        segment, n_segments, _, column, columns, *rest = job
        size, counts, steps, start = rest[:3], tuple(rest[3:6]), rest[6:9], rest[9]
        active = a.samples * int(np.prod(counts))
        reads = [step for taps in segments[segment : segment + n_segments] for step in _box_steps(taps, a)]
        key = segment, n_segments, counts
        if key not in fetched:
            all_boxes = boxes.setdefault(counts, _Boxes(a.x.base, counts, extents, a.samples))
            fetched[key] = sum(all_boxes.fetch(*read, a.BK) for read in reads)
        matrix += active * len(reads) * a.BO * int(np.prod(extents)) * a.BK
        loaded += fetched[key] + active * len(reads) * a.BO * a.BK * item
        # The job's record, and the segments'.
        loaded += SECTOR * (programs // a.jobs + active * a.splits * (1 + (2 + a.STRIDED) * n_segments))
        loaded += active * SECTOR * int(sectors_of(column * item, columns * item)) * _biased(a)
        index = np.meshgrid(*(np.arange(n * extent) for n, extent in zip(counts, extents, strict=True)), indexing="ij")
        inside = np.logical_and.reduce([i < n for i, n in zip(index, size, strict=True)])
        y_row = np.where(inside, start + sum(i * step for i, step in zip(index, steps, strict=True)), -1)
        split = [part for n, extent in zip(counts, extents, strict=True) for part in (n, extent)]
        y_row = y_row.reshape(split).transpose(0, 2, 4, 1, 3, 5).ravel()
        for sample in range(a.samples):
            rows = np.where(y_row < 0, -1, y_row + sample * a.y_positions)
            stored += _stored(a, rows, column, columns, a.BO)
    read = _Boxes.read(boxes.values()) + distinct_bytes(a.w.base) + a.size("p_jobs", "p_segments")
    written = _written(a, a.table("p_jobs", descriptor_tables.JOB_FIELDS)[: a.column_tiles, 4])
    return Work(matrix, 0, loaded, stored, read + a.size("p_bias") * _biased(a), written)


def finish(a: Arguments, programs: int) -> Work:
    item, sum_item = a.p_y.element_size(), a.p_sums.element_size()
    row, channel = np.ogrid[: a.rows, : a.channels]
    sample, position = row // a.positions, row % a.positions
    p_block = position // a.POSITIONS
    program = (sample * -(-a.positions // a.POSITIONS) + p_block) * -(-a.channels // a.CHANNELS) + channel // a.CHANNELS
    program = program.ravel()
    source = ((row * a.pitch + a.table("p_places")) * sum_item).ravel()
    residues, times = np.unique(np.arange(a.splits) * a.rows * a.pitch * sum_item % SECTOR, return_counts=True)
    loaded = sum(int(n) * by_block(source + residue, program) for residue, n in zip(residues, times, strict=True))
    of_channels = [a.p_places] + [a.p_bias] * bool(a.biased)
    for one in of_channels:
        loaded += by_block((channel * one.element_size() + 0 * row).ravel(), program)
    # A request takes 32 vectors, of a few rows, or positions of a few channels where these are not last.
    if a.Y_UNIT:
        rows = max(1, LANES * a.Y_UNIT // a.CHANNELS)
        request = (sample * -(-a.positions // rows) + position // rows) * a.channels + channel // (LANES * a.Y_UNIT)
        target = row * a.channels + channel
    else:
        target = (sample * a.channels + channel) * a.positions + position
        request = (sample * a.channels + channel) * a.positions + p_block
    stored = by_block((target * item).ravel(), request.ravel())
    read = a.splits * a.rows * a.channels * sum_item + sum(a.channels * one.element_size() for one in of_channels)
    return Work(0, 0, loaded, stored, read, a.size("p_y"))


def _box_steps(segment: np.ndarray, a: Arguments) -> Iterator[tuple[int, list[int], int]]:
    """Classes and places of a segment's boxes, relative to the program's, and first channels; as the kernel does."""
    fields = segment.tolist()
    of_blocks, of_taps = (value % 2**32 for value in fields[11:13])
    for count in range(0, fields[13], 2):
        tap = count * of_blocks >> 32
        u = tap * of_taps >> 32
        at = [o + tap * v + u * w for o, v, w in zip(fields[:3], fields[3:6], fields[6:9], strict=True)]
        place = 0
        if a.STRIDED:
            shifts, pitches = fields[14:17], fields[17:20]
            place = sum((i % (1 << shift)) * pitch for i, shift, pitch in zip(at, shifts, pitches, strict=True))
            at = [i >> shift for i, shift in zip(at, shifts, strict=True)]
        yield place, at, fields[9] + count * (a.BK // 2) + tap * fields[10]


class _Boxes:
    """Boxes that the copy engine fetches of a tensor ``(samples and classes, three axes, C)``, laid side by side."""

    def __init__(self, tensor: Tensor, counts: Sequence[int], extents: Sequence[int], samples: int):
        self.shape, self.strides, self.item = tensor.shape, tensor.stride(), tensor.element_size()
        self.counts, self.extents, self.samples = counts, extents, samples
        self.seen: dict[int, np.ndarray] = {}
        self.known: dict[tuple, int] = {}

    @staticmethod
    def read(several: Iterable[_Boxes]) -> int:
        """Bytes that several ways to fetch boxes of one tensor read of it, each once."""
        several = list(several)
        classes = {place for one in several for place in one.seen}
        seen = (np.logical_or.reduce([one.seen[place] for one in several if place in one.seen]) for place in classes)
        return sum(int(one.sum()) for one in seen) * VECTOR * several[0].samples

    def fetch(self, place: int, at: Sequence[int], channel: int, channels: int) -> int:
        """Bytes of sectors of every sample's boxes of a class, moved by ``at``: what of them is inside the tensor."""
        end = min(channel + channels, self.shape[-1])
        length, strides = (end - channel) * self.item, [stride * self.item for stride in self.strides[1:-1]]
        axes, ranges = [], []
        for count, extent, offset, size, stride in zip(
            self.counts, self.extents, at, self.shape[1:-1], strides, strict=True
        ):
            first = np.arange(count) * extent + offset
            begin = np.clip(first, 0, size)
            inside = np.clip(first + extent, 0, size) - begin
            axes.append(Counter(zip((begin * stride % SECTOR).tolist(), inside.tolist(), strict=True)))
            ranges.append(slice(max(0, offset), max(0, count * extent + offset)))
        vectors = -(-self.shape[-1] * self.item // VECTOR)
        seen = self.seen.setdefault(place, np.zeros((vectors, *self.shape[1:-1]), bool))
        seen[(slice(channel * self.item // VECTOR, -(-end * self.item // VECTOR)), *ranges)] = True
        total, start = 0, (place * self.strides[0] + channel) * self.item
        for kinds in itertools.product(*(axis.items() for axis in axes)):
            # Boxes of one size whose first sectors begin alike have the same number of them.
            residue = (sum(r for (r, _), _ in kinds) + start) % SECTOR
            key = residue, length, *(n for (_, n), _ in kinds)
            if min(key[1:]) <= 0:
                continue
            if key not in self.known:
                positions = sum(np.ix_(*(np.arange(n) * stride for n, stride in zip(key[2:], strides, strict=True))))
                self.known[key] = distinct(touched_sectors(residue + positions, length))
            total += int(np.prod([times for _, times in kinds])) * self.known[key]
        return total * self.samples


def gathered_weight_grad(a: Arguments, programs: int) -> Work:
    jobs = a.table("p_jobs", _HEAD + _TAP * a.TAPS)
    splits, size, logs = programs // a.jobs, (a.y_d, a.y_h, a.y_w), (a.log_d, a.log_h, a.log_w)
    boxes = [-(-n >> log) for n, log in zip(size, logs, strict=True)]
    # Every position of every step, in the order of the depth.
    rest, inner, index = np.arange(a.steps)[:, None], np.arange(a.BK)[None, :], []
    for n, log in zip(reversed(boxes), reversed(logs), strict=True):
        index.append(((rest % n << log) + (inner & ((1 << log) - 1))).ravel())
        rest, inner = rest // n, inner >> log
    sample = (rest * (a.BK >> sum(logs)) + inner).ravel()
    index = index[::-1]
    o_g = sample * a.g_sample + sum(i * s for i, s in zip(index, (a.g_d, a.g_h, a.g_w), strict=True))
    o_x = sample * a.x_sample + sum(i * s for i, s in zip(index, (a.x_d, a.x_h, a.x_w), strict=True))
    m_g = np.logical_and.reduce([i < n for i, n in zip(index, size, strict=True)])
    seen = np.zeros(-(-spanned(a.p_x) // a.UNIT), bool)
    loaded = stored = 0
    known: dict[tuple, int] = {}

    def requests(key, start, length, valid, lanes) -> int:
        # Where a run starts in a sector decides, not where it lies.
        if key not in known:
            known[key] = SECTOR * request_sectors(start * VECTOR, length * VECTOR, valid(), LANES // lanes)
        return known[key]

    for job in jobs:
        g_column, first, end, g_length, x_channel, first_c, group, x_length = (int(value) for value in job[:8])
        loaded += requests(("g", g_column % 2, g_length), o_g + g_column, g_length, lambda: m_g, a.BO // a.UNIT)
        axis = int(job[8])
        across = [other for other in range(3) if other != axis]
        c = np.arange(a.BC)
        c = c[(c >= -first_c) & (c < group - first_c)]
        for tap in job[_HEAD:].reshape(-1, _TAP):
            reach = {across[0]: job[9:11], across[1]: job[11:13], axis: tap[:2]}
            start = o_x + x_channel + int(tap[2])

            def valid(reach=reach):
                return np.logical_and.reduce(
                    [(index[i] >= begin) & (index[i] < begin + n) for i, (begin, n) in reach.items()]
                )

            key = ("x", axis, *job[9:13], *tap[:2], (x_channel + int(tap[2])) % 2, x_length)
            loaded += requests(key, start, x_length, valid, a.BC // a.UNIT)
            inside = start[valid()]
            for vector in range(x_length):
                seen[inside + vector] = True
            if tap[3] >= 0:
                channel = g_column * a.UNIT - a.first_channel + np.arange(first, end)
                at = channel * a.out_channel + tap[3] * a.channels + first_c
                for chunk in range(0, a.BC, LANES):
                    inside = c[(c >= chunk) & (c < chunk + LANES)]
                    if inside.size:
                        stored += splits * SECTOR * int(sectors_of((at + inside[0]) * 4, inside.size * 4).sum())
    loaded += programs * SECTOR * -(-jobs.itemsize * jobs.shape[1] // SECTOR)
    read = a.size("p_g", "p_jobs") + int(seen.sum()) * VECTOR
    # Triton lays the warps of several products along their rows; where these are too few, warps repeat each other.
    rows = max(a.BC, 16 * a.num_warps) if a.TAPS > 1 else a.BC
    matrix = a.jobs * a.steps * a.TAPS * rows * a.BO * a.BK
    return Work(matrix, 0, loaded, stored, read, a.size("p_out"))


def fetched_weight_grad(a: Arguments, programs: int) -> Work:
    fields = descriptor_weight_grad.JOB_FIELDS.value
    counts, extents = (a.boxes1, a.boxes2, a.boxes3), (a.B1, a.B2, a.B3)
    samples = a.g.base.shape[0]
    g, x = (_Boxes(descriptor.base, counts, extents, samples) for descriptor in (a.g, a.x))
    fetched: dict[tuple, int] = {}
    loaded = stored = 0
    for job in a.table("p_jobs", fields).tolist():
        first_o, first_c, channel, first, end, _, *taps = job
        fetches = [(g, 0, (0, 0, 0), first_o, a.BO)]
        taps = [taps[_FETCHED * i : _FETCHED * (i + 1)] for i in range(a.TAPS)]
        fetches += [(x, tap[4], tuple(tap[:3]), first_c, a.BC) for tap in taps]
        for tensor, place, at, begin, channels in fetches:
            key = tensor is g, place, at, begin
            if key not in fetched:
                fetched[key] = tensor.fetch(place, at, begin, channels)
            loaded += fetched[key]
        c = np.arange(max(channel, 0), min(channel + a.BC, a.channels))
        o = (
            np.arange(first, end)
            - a.first_channel
            + np.arange(programs // a.jobs)[:, None] * (a.out_split // a.out_channel)
        )
        for number in (tap[3] for tap in taps if tap[3] >= 0):
            for chunk in range(0, c.size, LANES):
                part = c[chunk : chunk + LANES]
                start = o * a.out_channel + number * a.channels + part[0]
                stored += SECTOR * int(sectors_of(start * 4, part.size * 4).sum())
    loaded += programs * SECTOR * int(sectors_of(0, fields * 4))
    matrix = a.jobs * a.steps * a.TAPS * a.BC * a.BO * a.B1 * a.B2 * a.B3
    read = _Boxes.read([g]) + _Boxes.read([x]) + a.size("p_jobs")
    return Work(matrix, 0, loaded, stored, read, a.size("p_out"))


def pack(a: Arguments, programs: int) -> Work:
    """A program reads all taps of its channels, which follow each other."""
    item, (per_place, depth) = a.p_w.element_size(), (a.BK, a.SIDE) if a.TRANSPOSED else (a.SIDE, a.BK)
    outputs, numbers = a.table("p_outputs"), a.table("p_numbers")
    of_place, tile = np.divmod(np.arange(programs), a.tiles)
    first = np.minimum(np.arange(a.tiles) * depth, a.channels)
    length = (np.minimum(first + depth, a.channels) - first) * a.of_channel * item
    used = np.flatnonzero(numbers.max(axis=(0, 1)) >= 0)
    start = (outputs[used, None] * a.channels + first) * a.of_channel * item
    loaded = _run_sectors(start, length, used[:, None] // per_place * a.tiles + np.arange(a.tiles))
    inside = np.minimum(of_place * per_place + per_place, a.places) - of_place * per_place
    for rows in (1, numbers.shape[0] * a.taps):  # output channels, and their taps
        begin = (np.arange(rows)[:, None] * a.places + of_place * per_place) * 4
        loaded += _run_sectors(begin, inside * 4, np.arange(programs))
    loaded += SECTOR * int(sectors_of((of_place if a.TRANSPOSED else tile) * a.taps * 4, a.taps * 4).sum())
    stored = a.size("p_packed")
    return Work(0, 0, loaded, stored, a.size("p_w", "p_outputs", "p_numbers", "p_steps"), stored)


def _run_sectors(start: np.ndarray, length: np.ndarray, program: np.ndarray) -> int:
    """Bytes of the distinct sectors that each program touches by runs of bytes."""
    start, length, program = (one.ravel() for one in np.broadcast_arrays(start, length, program))
    start, length, program = (one[length > 0, None] for one in (start, length, program))
    at = np.minimum(np.arange(0, int(length.max(initial=0)) + SECTOR - 1, SECTOR), length - 1)
    return by_block(start + at, program + 0 * at)


def add_splits(a: Arguments, programs: int) -> Work:
    i, item = np.arange(a.elements), a.p_partial.element_size()
    channel, tap, row = i % a.channels, i // a.channels % a.taps, i // a.channels // a.taps
    place, loaded, read = row * a.number_row + tap, 0, a.splits * a.elements * item
    number = tap
    if a.MERGED:
        number = a.table("p_number").ravel()[place]
        loaded = by_block(place * a.p_number.element_size(), i // a.BLOCK)
        read += np.unique(place).size * a.p_number.element_size()
    source = ((row * a.partial_taps + number) * a.channels + channel) * item
    residues, times = np.unique(np.arange(a.splits) * a.partial_elements * item % SECTOR, return_counts=True)
    loaded += sum(int(n) * by_block(source + residue, i // a.BLOCK) for residue, n in zip(residues, times, strict=True))
    out = ((row * a.channels + channel) * a.taps + tap) * a.p_out.element_size()
    return Work(0, 0, loaded, by_block(out, i // LANES), read, a.size("p_out"))
