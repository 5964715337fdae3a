"""Host plan of the depthwise kernels: which programs there are, and their tiles. Plain integers.

One program computes one *box* of positions for one *window* of channels in one view:

* A box is ``rows x rows x width`` positions of ``(D, H, W)``, the same for every view, so that the
  programs that touch the same memory run side by side and share it through L1 and L2. A view
  slides over the box along its own axis ``u`` (H in the axial view, D in the others): every
  source row is loaded once per ``v`` tap and feeds up to ``ku`` accumulators.
* Windows are cut at the view bounds and start at a multiple of the vector width, so that loads
  are whole vectors everywhere; only the last store of a window that belongs to two views is not.
* The input gradient of a strided convolution falls into ``stride**3`` parity classes. Within a
  class it is an ordinary correlation of the output gradient with a part of the taps, so that a
  class is nothing but one more entry of the program table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import gcd

from ..geometry import PLANE_AXES, Geometry

FIELDS = 32
"""int32 entries a program's record takes in the table; their order is that of :func:`_record`."""
MAX_TAPS = 49
"""Largest ``ku * kv``: the weight gradient keeps one accumulator a tap."""


@dataclass(frozen=True)
class Tile:
    """Constants of one compiled program; a box is ``rows x rows x width`` positions."""

    rows: int
    width: int
    channels: int
    num_warps: int = 4


def conv_tile(size, channels_last: bool, stride: int) -> Tile:
    """Tile of the convolution and the input gradient.

    Eight rows load ``(8 + k - 1) / 8`` rows for each row they compute, and four elements a thread
    keep all their accumulators at about a hundred registers (a quarter of the warps a
    multiprocessor can hold); fewer rows, or more elements, were worse by counted work. A stride
    of two needs twice the source rows.

    Args:
        size: positions that one parity class computes, per axis ``(D, H, W)``.
        channels_last: whether channels, not W, lie next to each other in memory.
        stride: the largest at which the source is read.
    """
    return _tile(channels_last, rows=8 if stride == 1 and min(size[:2]) > 4 else 4, each=4)


def weight_grad_tile(channels_last: bool, taps: int) -> Tile:
    """Tile of the weight gradient; ``taps`` is ``ku * kv``.

    A thread holds ``taps`` accumulators for each of its elements, so the more taps, the fewer
    elements.
    """
    return _tile(channels_last, rows=4, each=4 if taps <= 9 else 2 if taps <= 25 else 1)


def _tile(channels_last: bool, rows: int, each: int, run: int = 16) -> Tile:
    """Four warps of ``each`` elements a thread.

    A warp's lanes lie along the axis that is contiguous in memory, ``run`` elements of it, at least 32
    bytes. One extent there serves all sizes, so that few binaries are compiled.
    """
    elements = 128 * each // rows
    return Tile(rows, elements // run, run) if channels_last else Tile(rows, run, elements // run)


def candidates(kernel: str, taps: int, channels_last: bool) -> tuple[Tile, ...]:
    """Tiles that tuning tries: fewer rows, fewer elements a thread, longer runs of memory than the heuristic's."""
    most = conv_tile((8, 8, 8), channels_last, 1) if kernel == "conv" else weight_grad_tile(channels_last, taps)
    each = most.rows * most.width * most.channels // 128
    shapes = product((most.rows, most.rows // 2), (each, max(1, each // 2)), (16, 32))
    return tuple(dict.fromkeys(_tile(channels_last, *shape) for shape in shapes))


def all_tiles(kernel: str, taps: int, channels_last: bool, stride: int) -> tuple[Tile, ...]:
    """Every tile that ``kernel`` ("conv" or "weight_grad") can get for ``taps = ku * kv``, a layout and a stride.

    The input gradient reads its source at stride 1, whatever the convolution's.
    """
    if kernel == "weight_grad":
        return (weight_grad_tile(channels_last, taps),)
    if kernel != "conv":
        raise ValueError(f"kernel={kernel!r} is not known; use 'conv' or 'weight_grad'")
    return tuple(dict.fromkeys(conv_tile((edge, edge, 1), channels_last, stride) for edge in (4, 5)))


def windows(first: int, end: int, vector: int, channels: int) -> range:
    """First channels of the windows that cover ``[first, end)``: aligned to ``vector``."""
    return range(first // vector * vector, end, channels)


@dataclass(frozen=True)
class Programs:
    """The program table of one launch.

    Attributes:
        records: one tuple of :data:`FIELDS` ints for each program of a box.
        slide: stride of the sliding axis in taps, where rows can be shared by sliding; else 0.
    """

    records: tuple[tuple[int, ...], ...]
    slide: int


@lru_cache(maxsize=1024)
def conv_programs(geometry: Geometry, vector: int, channels: int) -> Programs:
    """Programs of the convolution and of the weight gradient (it visits the same positions)."""
    ku, kv = geometry.kernel_size
    records, slides = [], set()
    for view, first, end in geometry.views:
        u, v = PLANE_AXES[view]
        dilation = geometry.dilation[view]
        delta = [0, 0, 0]
        delta[u], delta[v] = dilation[u], dilation[v]
        slides.add(_slide(geometry.stride[u], dilation[u], ku))
        for channel in windows(first, end, vector, channels):
            records.append(
                _record(
                    view,
                    (channel, first, end),
                    (ku, kv),
                    (0, kv, 1),
                    (geometry.start[view], delta, geometry.stride, geometry.input_size),
                    ((0, 0, 0), (1, 1, 1), geometry.output_size),
                )
            )
    return _programs(records, slides)


@lru_cache(maxsize=1024)
def input_grad_programs(geometry: Geometry, vector: int, channels: int) -> Programs:
    """Programs of the input gradient: every view's windows in every parity class."""
    stride, kernel = geometry.stride, geometry.kernel_size
    classes = list(product(*(range(min(s, size)) for s, size in zip(stride, geometry.input_size, strict=True))))
    records, slides = [], set()
    for residue in classes:
        size = tuple(-(-(n - r) // s) for n, r, s in zip(geometry.input_size, residue, stride, strict=True))
        for view, first, end in geometry.views:
            taps = [
                _class_taps(residue[a], stride[a], geometry.start[view][a], geometry.dilation[view][a], k)
                for a, k in enumerate(geometry.extent(view))
            ]
            u, v = PLANE_AXES[view]
            counts = (taps[u].count, taps[v].count) if all(t.count for t in taps) else (0, 0)
            scale = (kernel[1], 1)
            weight = (
                taps[u].first * scale[0] + taps[v].first * scale[1],
                -taps[u].step * scale[0],
                -taps[v].step * scale[1],
            )
            delta = [0, 0, 0]
            delta[u], delta[v] = taps[u].delta, taps[v].delta
            slides.add(_slide(1, delta[u], kernel[0]) if counts[0] == kernel[0] else 0)
            for channel in windows(first, end, vector, channels):
                records.append(
                    _record(
                        view,
                        (channel, first, end),
                        counts,
                        weight,
                        ([t.base for t in taps], delta, (1, 1, 1), geometry.output_size),
                        (residue, stride, size),
                    )
                )
    return _programs(records, slides)


def largest_class(geometry: Geometry) -> tuple[int, int, int]:
    """Positions per axis of the input gradient's largest parity class."""
    return tuple(-(-size // stride) for size, stride in zip(geometry.input_size, geometry.stride, strict=True))


def _programs(records, slides: set[int]) -> Programs:
    # One binary serves all views, so rows slide only if they do so alike in each.
    return Programs(tuple(records), slides.pop() if len(slides) == 1 else 0)


def _slide(stride: int, delta: int, taps: int) -> int:
    """Rows from one output to the next, in taps, where neighbouring outputs share rows; else 0."""
    rows, rest = divmod(stride, delta)
    return rows if not rest and rows < taps else 0


@dataclass(frozen=True)
class _ClassTaps:
    """Taps of one axis that reach a parity class, last one first so that positions ascend.

    Tap ``first - i * step`` (``i < count``) reads output position ``q + base + i * delta`` for the
    class's position number ``q``.
    """

    count: int
    first: int
    step: int
    base: int
    delta: int


def _class_taps(residue: int, stride: int, start: int, dilation: int, taps: int) -> _ClassTaps:
    step = stride // gcd(stride, dilation)
    hits = [t for t in range(taps) if (residue - start - t * dilation) % stride == 0]
    first = hits[-1] if hits else 0
    return _ClassTaps(len(hits), first, step, (residue - start - first * dilation) // stride, dilation * step // stride)


def _record(view, channels, counts, weight, source, target) -> tuple[int, ...]:
    """One program. Per-axis values are given as ``(D, H, W)`` and kept as ``(u, o, W)``.

    Args:
        channels: ``(first of the window, first of the view, end of the view)``.
        counts: ``(taps along u, taps along v)``.
        weight: ``(offset of the first tap, step along u, step along v)`` in one channel's taps.
        source: ``(base, delta, stride, size)``: index ``i``, tap ``t`` read
            ``i * stride + base + t * delta``, zero outside ``size``.
        target: ``(base, stride, size)``: index ``i < size`` is written to ``i * stride + base``.
    """
    u = PLANE_AXES[view][0]
    order = (u, 1 - u, 2)
    axes = [axis[a] for axis in (*source, *target) for a in order]
    record = (u, *channels, *counts, *weight, *axes)
    return record + (0,) * (FIELDS - len(record))
