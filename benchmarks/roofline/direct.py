"""Work of the kernels without large tiles: depthwise, stem, the sums of their weight gradients, layout conversions."""

from __future__ import annotations

import numpy as np

from acs_triton.kernels import stem_plan

from .launches import distinct_bytes
from .traffic import (
    LANES,
    SECTOR,
    Arguments,
    Work,
    by_block,
    distinct,
    one_by_one,
    request_sectors,
    sectors_of,
    touched_sectors,
)


def depthwise_conv(a: Arguments, programs: int) -> Work:
    _channels_last_only(a)
    item, boxes = a.p_x.element_size(), (a.n_d, a.n_h, a.n_w)
    extents, x_strides, y_strides = (a.ROWS, a.ROWS, a.WIDTH), (a.s_xd, a.s_xh, a.s_xw), (a.s_yd, a.s_yh, a.s_yw)
    samples = programs // (a.n_programs * int(np.prod(boxes)))
    tile = a.ROWS * a.WIDTH * a.CHANNELS
    each = min(tile // (LANES * a.num_warps), a.VECTOR)
    seen = np.zeros(a.p_x.numel() // a.p_x.shape[0] // a.VECTOR, bool)
    scalar = loaded = stored = 0
    for record in (_Record(row, a) for row in a.table("p_programs")):
        scalar += int(np.prod(boxes)) * (a.KU if a.SLIDE else record.n_u) * record.n_v * a.ROWS * tile
        channels = record.read_end - record.channel
        w_item = a.p_w.element_size()
        once = record.n_u * record.n_v * sectors_of(record.channel * w_item, channels * w_item)
        once += bool(a.biased) * sectors_of(record.channel * item, channels * item) + 4  # 30 words of the record
        loaded += int(np.prod(boxes) * once) * SECTOR
        taps = (record.n_u, record.n_v, record.n_v) if record.n_u and record.n_v else (0, 0, 0)
        sets = []
        for axis, real in enumerate(record.order):
            outputs = np.arange(boxes[real] * extents[real]).reshape(boxes[real], extents[real])
            limit = outputs.size if axis == 0 else record.count[axis]  # rows past the end are read too
            sets.append([record.reads(axis, box[box < limit], taps[axis]) for box in outputs])
        for u in sets[0]:
            for o in sets[1]:
                start = record.addresses((u, o, np.concatenate(sets[2])), x_strides, record.channel, a, item)
                seen[(start[..., None] // (item * a.VECTOR) + np.arange(channels // a.VECTOR)).ravel()] = True
                for w in sets[2]:
                    start = record.addresses((u, o, w), x_strides, record.channel, a, item)
                    loaded += distinct(touched_sectors(start, channels * item))
        first, end = record.own
        positions = [np.arange(n) * by + to for n, by, to in zip(record.count, record.by, record.to, strict=True)]
        start = record.addresses(positions, y_strides, 0, a, a.p_y.element_size())
        # Vectors of two views are stored element by element, a thread's elements one after the other.
        own = np.arange(first, end)
        vectors = own // a.VECTOR * a.VECTOR
        full = (vectors >= record.first) & (vectors + a.VECTOR <= record.end)
        rest = own[~full]
        for part in (own[full], *(rest[(rest - record.channel) % each == lane] for lane in range(each))):
            sectors = (start[..., None] + part * a.p_y.element_size()) // SECTOR
            stored += SECTOR * int(np.count_nonzero(np.diff(sectors, axis=-1, prepend=-1)))
    tables = a.size("p_w", "p_programs") + (a.size("p_b") if a.biased else 0)
    read = samples * int(seen.sum()) * a.VECTOR * item + tables
    return Work(0, samples * scalar, samples * loaded, samples * stored, read, a.size("p_y"))


def depthwise_weight_grad(a: Arguments, programs: int) -> Work:
    _channels_last_only(a)
    item, boxes, extents = a.p_x.element_size(), (a.n_d, a.n_h, a.n_w), (a.ROWS, a.ROWS, a.WIDTH)
    g_strides, x_strides = (a.s_gd, a.s_gh, a.s_gw), (a.s_xd, a.s_xh, a.s_xw)
    total, taps, cuts = a.samples * int(np.prod(boxes)), a.KU * a.KV, programs // a.n_programs
    tile = a.ROWS * a.WIDTH * a.CHANNELS
    seen = np.zeros(a.p_x.numel() // a.VECTOR, bool)
    scalar = stored = 0
    loaded = programs * 4 * SECTOR  # the record
    for record in (_Record(row, a) for row in a.table("p_programs")):
        channels = record.read_end - record.channel
        for cut in range(cuts):
            touched = []
            for box in range(cut * a.each, min((cut + 1) * a.each, total)):
                rest, place = box, []
                for n in reversed(boxes):
                    rest, i = divmod(rest, n)
                    place.insert(0, i)
                outputs = [np.arange(place[i] * extents[i], (place[i] + 1) * extents[i]) for i in record.order]
                outputs = [
                    out[out < n] if k else out for k, (out, n) in enumerate(zip(outputs, record.count, strict=True))
                ]
                if a.SLIDE:
                    outputs[0] = outputs[0] - max(0, int(outputs[0][-1]) - record.count[0] + 1)
                else:
                    outputs[0] = outputs[0][outputs[0] < record.count[0]]
                scalar += taps * outputs[0].size * tile
                g = record.addresses(outputs, g_strides, record.channel, a, item)
                reads = [
                    record.reads(k, out, n) for k, (out, n) in enumerate(zip(outputs, (a.KU, a.KV, a.KV), strict=True))
                ]
                x = record.addresses(reads, x_strides, record.channel, a, item) + rest * a.s_xn * a.VECTOR * item
                seen[(x[..., None] // (item * a.VECTOR) + np.arange(channels // a.VECTOR)).ravel()] = True
                # The two tensors' addresses are kept apart.
                touched.append(touched_sectors(x, channels * item))
                touched.append(-1 - touched_sectors(g + rest * a.s_gn * a.VECTOR * item, channels * item))
            loaded += distinct(np.concatenate(touched))
        own = np.arange(*record.own)
        sectors = [np.unique((own * taps + tap) * 4 // SECTOR).size for tap in range(taps)]
        stored += cuts * SECTOR * sum(sectors)
    read = int(seen.sum()) * a.VECTOR * item + a.size("p_g", "p_programs")
    return Work(0, scalar, loaded, stored, read, a.size("p_partial"))


class _Record:
    """A row of the depthwise kernels' program table, by names; axes in its order ``(u, o, W)``."""

    def __init__(self, row: np.ndarray, a: Arguments):
        row = row.tolist()
        self.u, self.channel, self.first, self.end, self.n_u, self.n_v = row[:6]
        self.base, self.delta, self.step, self.size, self.to, self.by, self.count = (
            row[i : i + 3] for i in range(9, 30, 3)
        )
        self.order = (self.u, 1 - self.u, 2)
        self.channel -= self.channel % a.VECTOR
        self.read_end = min(self.channel + a.CHANNELS, -(-self.end // a.VECTOR) * a.VECTOR)
        self.own = max(self.first, self.channel), min(self.end, self.channel + a.CHANNELS)

    def reads(self, axis: int, outputs: np.ndarray, taps: int) -> np.ndarray:
        """Positions along an axis that ``taps`` taps of these outputs read inside the tensor."""
        at = outputs[:, None] * self.step[axis] + self.base[axis] + np.arange(taps) * self.delta[axis]
        return np.unique(at[(at >= 0) & (at < self.size[axis])])

    def addresses(self, positions, strides, channel: int, a: Arguments, item: int) -> np.ndarray:
        """Bytes at which these positions' channel lies; positions and strides of ``D, H, W`` in the record's order."""
        u, o, w = (p * strides[axis] * a.VECTOR for p, axis in zip(positions, self.order, strict=True))
        return ((u[:, None, None] + o[:, None] + w) + channel) * item


def _channels_last_only(a: Arguments) -> None:
    if not a.CHANNELS_LAST:
        raise NotImplementedError("the traffic of tensors whose channels are not last is not counted")


def stem_conv(a: Arguments, programs: int) -> Work:
    stem = _Stem(a, programs // (a.n_columns * a.n_d * a.n_h * a.n_w))
    boxes, y_item = stem.inside.shape[0], a.p_y.element_size()
    seen = np.zeros(a.p_x.numel(), bool)
    start = stem.outputs(a, "y")
    loaded = stored = 0
    for view in np.unique(stem.columns[:, 2]):
        tiles = stem.tiles(view, a.COLUMNS)
        for elements in stem.reads(view, slice(None)):
            loaded += len(tiles) * distinct(elements * stem.item // SECTOR)
            seen[elements] = True
        for first, end in tiles:
            loaded += boxes * ((end - first) * a.depth * stem.item + stem.tables(view, 0, a.depth))
            loaded += boxes * bool(a.biased) * SECTOR * int(sectors_of(first * stem.item, (end - first) * stem.item))
            if a.CHANNELS_LAST:
                runs = (start + first) * y_item, (end - first) * y_item
                stored += SECTOR * request_sectors(*runs, stem.inside, LANES // a.COLUMNS)
            else:  # a request takes positions of one channel
                stored += one_by_one(start, stem.inside, np.arange(first, end) * a.s_yc, y_item)
    matrix = programs * a.depth * a.ROWS * a.COLUMNS
    tables = a.size("p_w", "p_views", "p_pairs", "p_columns") + (a.size("p_b") if a.biased else 0)
    return Work(matrix, 0, loaded, stored, int(seen.sum()) * stem.item + tables, a.size("p_y"))


def stem_weight_grad(a: Arguments, programs: int) -> Work:
    stem = _Stem(a, a.samples)
    depth_steps = a.depth // a.DEPTH
    cuts = [slice(i * a.each, (i + 1) * a.each) for i in range(programs // (a.n_columns * depth_steps))]
    seen = np.zeros(a.p_x.numel(), bool)
    start = stem.outputs(a, "g")
    loaded = stored = 0
    for view in np.unique(stem.columns[:, 2]):
        tiles = stem.tiles(view, a.COLUMNS)
        for step in range(depth_steps):
            pairs = slice(step * a.DEPTH, (step + 1) * a.DEPTH)
            reads = list(stem.reads(view, pairs))
            for cut in cuts:
                elements = np.concatenate(reads[cut])
                loaded += len(tiles) * (
                    distinct(elements * stem.item // SECTOR) + stem.tables(view, pairs.start, a.DEPTH)
                )
                seen[elements] = True
            k = np.arange(pairs.start, min(pairs.stop, a.pairs))
            for first, end in tiles:
                at = np.arange(first, end)[:, None] * a.pairs + np.arange(len(cuts)) * a.elements
                for chunk in range(0, k.size, LANES):
                    part = k[chunk : chunk + LANES]
                    stored += SECTOR * int(sectors_of((at + part[0]) * 4, part.size * 4).sum())
        for first, end in tiles:
            channels = np.arange(first, end) * a.s_gc
            for cut in cuts:
                elements = start[cut][stem.inside[cut]][:, None] + channels
                loaded += depth_steps * distinct(elements * stem.item // SECTOR)
    matrix = stem.inside.size * a.COLUMNS * a.depth * a.n_columns
    tables = a.size("p_g", "p_views", "p_pairs", "p_columns")
    return Work(matrix, 0, loaded, stored, int(seen.sum()) * stem.item + tables, a.size("p_partial"))


class _Stem:
    """What the stem's two kernels share: the rows of every box, and which pairs they read."""

    def __init__(self, a: Arguments, samples: int):
        counts, logs = (a.n_d, a.n_h, a.n_w), (a.ROWS.bit_length() - 1 - a.log_h - a.log_w, a.log_h, a.log_w)
        self.pairs, self.views = a.table("p_pairs", a.depth), a.table("p_views", stem_plan.VIEW_FIELDS)
        self.columns = a.table("p_columns", stem_plan.COLUMN_FIELDS)
        self.item = a.p_x.element_size()
        box, row, self.index = np.arange(samples * a.n_d * a.n_h * a.n_w)[:, None], np.arange(a.ROWS)[None, :], []
        for n, log in zip(reversed(counts), reversed(logs), strict=True):
            self.index.insert(0, (box % n << log) + (row & ((1 << log) - 1)))
            box, row = box // n, row >> log
        self.sample = box
        self.inside = np.logical_and.reduce([i < n for i, n in zip(self.index, (a.y_d, a.y_h, a.y_w), strict=True)])
        self.sizes, self.steps = (a.x_d, a.x_h, a.x_w), (a.step_d, a.step_h, a.step_w)
        self.strides, self.s_n = (a.s_xd, a.s_xh, a.s_xw), a.s_xn

    def reads(self, view: int, pairs: slice):
        """For each box, the elements of the input that these pairs read, with repetitions."""
        record = self.views[view].reshape(3, 3).tolist()
        invalid, first, start = stem_plan.NEVER, 0, self.sample * self.s_n
        for axis, (base, dilation, taps) in enumerate(record):
            at = self.index[axis] * self.steps[axis] + base
            start = start + at * self.strides[axis]
            for tap in range(taps):
                inside = (at + tap * dilation >= 0) & (at + tap * dilation < self.sizes[axis])
                invalid = invalid | np.where(inside, 0, 1 << (first + tap))
            first += taps
        invalid = np.where(self.inside, invalid, 2 * stem_plan.NEVER - 1)
        entries = self.pairs[view, pairs]
        need, offset = entries & ((1 << stem_plan.NEED_BITS) - 1), entries >> stem_plan.NEED_BITS
        for box in range(start.shape[0]):
            yield (offset[:, None] + start[box])[(need[:, None] & invalid[box]) == 0]

    def outputs(self, a: Arguments, name: str) -> np.ndarray:
        """For each row of each box, the element of an output-shaped tensor at which its first channel lies."""
        strides = (a[f"s_{name}{axis}"] for axis in "dhw")
        return self.sample * a[f"s_{name}n"] + sum(i * s for i, s in zip(self.index, strides, strict=True))

    def tiles(self, view: int, columns: int) -> list[tuple[int, int]]:
        """First and end channel of a view's column tiles."""
        return [(int(first), int(min(end, first + columns))) for first, end, v in self.columns if v == view]

    def tables(self, view: int, first_pair: int, pairs: int) -> int:
        """Bytes that a program loads of the tables."""
        record = sectors_of(view * 4 * stem_plan.VIEW_FIELDS, 4 * stem_plan.VIEW_FIELDS) + 1  # and the column tile's
        return SECTOR * int(record + sectors_of((view * self.pairs.shape[1] + first_pair) * 8, pairs * 8))


def sum_partials(a: Arguments, programs: int) -> Work:
    first, item, total = np.arange(0, a.elements, a.ELEMENTS), a.p_out.element_size(), a.p_partial.element_size()
    start = (np.arange(a.cuts)[:, None] * a.elements + first) * total
    loaded = SECTOR * int(sectors_of(start, np.minimum(a.elements - first, a.ELEMENTS) * total).sum())
    i = np.arange(a.elements)
    return Work(0, 0, loaded, by_block(i * item, i // LANES), a.size("p_partial"), a.size("p_out"))


def layout_conversion(a: Arguments, programs: int) -> Work:
    item, row = a.p_x.element_size(), a.row_vectors * a.UNIT
    x_sample, x_channel, *x_strides = (a[f"x_{name}"] * a.X_UNIT for name in ("sample", "channel", "d", "h", "w"))
    position = np.arange(a.blocks * a.BP)
    valid = position < a.positions
    at = position
    if not a.FLAT:
        h, w = a.size_h, a.size_w
        at = sum(i * s for i, s in zip((at // (h * w), at // w % h, at % w), x_strides, strict=True))
    at, block = at[valid, None], position[valid, None] // a.BP
    group, channel = np.divmod(np.arange(row), a.group_vectors * a.UNIT)
    source = np.where(channel < a.channels, group * a.channels + channel, -1)
    loaded = stored = 0
    for sample in range(programs // (a.tiles * a.blocks)):
        for column in range(0, row, a.BC):
            c = source[column : column + a.BC]
            start = sample * x_sample + c[c >= 0] * (1 if a.ALONG_CHANNELS else x_channel)
            loaded += by_block((start + at) * item, block)
            start = ((sample * a.positions + position) * row + column) * item
            stored += SECTOR * request_sectors(start, c.size * item, valid, LANES // (a.BC // a.UNIT))
    return Work(0, 0, loaded, stored, distinct_bytes(a.p_x), a.size("p_y"))
