"""Host plan of the stem kernels: the flattened depth, the column tiles, the tiles' sizes. Plain integers.

A network's first convolution reads one to four channels. A matrix product over taps x channels,
with the channels padded to the 16 that a matrix instruction takes, would multiply mostly zeros;
here the depth runs over ``(channel, tap)`` pairs without a gap, in the weight's own order, and a
table tells where each pair lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ..geometry import PLANE_AXES, Geometry

MAX_CHANNELS = 4
NEED_BITS = 21
"""A row keeps one bit for each tap position of each axis that reads outside the input, and one that
is always set: pairs that only fill the depth need that one and so read zero."""
NEVER = 1 << (NEED_BITS - 1)
VIEW_FIELDS, COLUMN_FIELDS = 9, 3


@dataclass(frozen=True)
class Tile:
    """A tile of positions x output channels, in steps of ``depth``.

    The convolution's depth are ``(channel, tap)`` pairs. The weight gradient's tile has ``depth``
    pairs as rows, and its depth are positions.
    """

    positions: int
    columns: int
    depth: int
    num_warps: int = 4


def conv_tile(widest: int, itemsize: int) -> Tile:
    """Tile of the convolution for ``widest`` output channels of the largest view.

    Twice the positions or columns would spill: a thread gathers element by element.
    """
    return Tile(128, _columns(widest), 32 if itemsize <= 2 else 16)


def weight_grad_tile(widest: int, itemsize: int) -> Tile:
    """Tile of the weight gradient; arguments as for :func:`conv_tile`. Twice the positions or columns would spill."""
    return Tile(32, _columns(widest), 64)


def _columns(widest: int) -> int:
    return 16 if widest <= 16 else 32


def all_tiles(kernel: str, itemsize: int) -> tuple[Tile, ...]:
    """Every tile that ``kernel`` ("conv" or "weight_grad") can get."""
    choose = {"conv": conv_tile, "weight_grad": weight_grad_tile}
    if kernel not in choose:
        raise ValueError(f"kernel={kernel!r} is not known; use 'conv' or 'weight_grad'")
    return tuple(choose[kernel](widest, itemsize) for widest in (16, 32))


def candidates(kernel: str, itemsize: int) -> tuple[Tile, ...]:
    """Tiles that tuning tries: fewer positions, and any number of columns and depth that does not spill."""
    most = all_tiles(kernel, itemsize)[-1]
    positions = {"conv": (most.positions, most.positions // 2), "weight_grad": (most.positions,)}[kernel]
    depths = dict.fromkeys((most.depth, max(most.depth // 2, 16)))
    return tuple(Tile(*shape) for shape in product(positions, (16, 32), depths))


def widest(geometry: Geometry) -> int:
    """Output channels of the largest view."""
    return max(geometry.split)


@dataclass(frozen=True)
class Plan:
    """Tables of one geometry, as rows of ints.

    Attributes:
        views: per view, for each axis ``D, H, W``: first position, dilation, number of taps.
        pairs: per view and ``(channel, tap)`` pair, its element relative to that of tap 0, channel 0,
            times ``2**NEED_BITS``, plus the bits of the tap positions that must be inside the input:
            one 64-bit load.
        columns: per column tile: first channel, end channel, view.
        depth: number of pairs, padded to whole steps.
    """

    views: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]
    depth: int


@lru_cache(maxsize=256)
def plan(geometry: Geometry, channels: int, strides: tuple[int, ...], tile: Tile) -> Plan:
    """Tables for ``channels`` input channels; ``strides`` are the input's of C, D, H, W."""
    ku, kv = geometry.kernel_size
    depth = -(-channels * ku * kv // tile.depth) * tile.depth
    filling = depth - channels * ku * kv
    views, pairs, columns = [], [], []
    for number, (view, first, end) in enumerate(geometry.views):
        extent, start, dilation = geometry.extent(view), geometry.start[view], geometry.dilation[view]
        views.append(tuple(value for axis in zip(start, dilation, extent, strict=True) for value in axis))
        row = []
        for channel, tap_u, tap_v in product(range(channels), range(ku), range(kv)):
            taps = [0, 0, 0]
            for axis, tap in zip(PLANE_AXES[view], (tap_u, tap_v), strict=True):
                taps[axis] = tap
            position = (channel, *(tap * step for tap, step in zip(taps, dilation, strict=True)))
            offset = sum(p * s for p, s in zip(position, strides, strict=True))
            row.append((offset << NEED_BITS) + sum(1 << (sum(extent[:axis]) + taps[axis]) for axis in range(3)))
        pairs.append((*row, *(NEVER,) * filling))
        columns += [(o, end, number) for o in range(first, end, tile.columns)]
    return Plan(tuple(views), tuple(pairs), tuple(columns), depth)


def box(size, positions: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Boxes of ``positions`` that cover ``size``: their number per axis, and ``log2`` of their H and W edges."""
    edges, left = [0, 0], positions.bit_length() - 1
    for axis, most in ((1, 4), (0, 2)):
        edges[axis] = min(left, most, (size[axis + 1] - 1).bit_length())
        left -= edges[axis]
    counts = tuple(-(-n // (1 << log)) for n, log in zip(size, (left, *edges), strict=True))
    return tuple(counts), tuple(edges)
