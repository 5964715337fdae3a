"""Tiles of the matrix kernels, chosen from shapes and the device's limits. Plain Python.

No looped kernel gets more than four warps: Triton has compiled such loops into wrong code at eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

WARPS = 4

MAX_WORKSPACE = 48 << 20
"""Bytes of partial sums that the weight gradient may ask for."""

LEAST_STEPS = 8
"""Steps that make the start and the end of a program of the weight gradient worth while."""


@dataclass(frozen=True)
class GemmTile:
    """Rows (positions), columns (channels written) and depth (channels read) of a tile.

    ``merged``: a tile's columns are those of any view, and its steps go over the merged taps of all of them.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    merged: bool = False


@dataclass(frozen=True)
class WeightTile:
    """Input channels, output channels and depth (positions) of a tile; ``taps`` tiles share a program.

    ``merged`` is as in :class:`GemmTile`.
    """

    bc: int
    bo: int
    bk: int
    taps: int
    num_warps: int
    num_stages: int
    merged: bool = False


COLUMN_OVERHEAD = 32
"""Cost of reading the gathered rows once, in columns of a tile."""

READING = {80: 32, 90: 64, 100: 128, 103: 128}
"""Products that a multiprocessor makes while it reads one value from the L2 cache, by compute capability.

From data sheets, at 64 bytes a clock (A100, H100, B200). Other NVIDIA GPUs make fewer with float32 sums (eight:
GeForce), AMD's read twice as much (16: MI300X); without matrix instructions it is four at most.
"""

STEP_OVERHEAD = 16
"""Cost of a step that does not depend on its depth, in channels."""

PROGRAM_OVERHEAD = 3
"""Cost of a program's start and end, in steps."""


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def _cheapest(widths: Sequence[int], sizes: Sequence[int], overhead: int) -> int:
    """Tile size that covers runs of these widths at the least cost; the larger of equals."""
    return min(sizes, key=lambda size: (sum(_ceil(w, size) // size * (size + overhead) for w in widths), -size))


def _columns(itemsize: int, exact: bool) -> tuple[int, ...]:
    return (16, 32, 64) if exact or itemsize == 8 else (16, 32, 64, 128)


def _depths(itemsize: int, exact: bool) -> tuple[int, ...]:
    return (16,) if exact or itemsize == 8 else (16, 32) if itemsize == 4 else (32, 64)


def _stages(tile_bytes: int, shared_memory: int) -> int:
    """As many as let two programs share a multiprocessor, from two to four."""
    return max(2, min(4, shared_memory // 2 // tile_bytes))


def gemm_tile(
    columns: Sequence[int],
    depths: Sequence[int],
    itemsize: int,
    exact: bool,
    shared_memory: int,
) -> GemmTile:
    """Tile of the gather GEMM, whatever the volume: one binary serves all.

    Args:
        columns: channels that each run of columns (a view, or a channel group) writes.
        depths: channels that each run of channels read at one tap has.
        itemsize: bytes of an element.
        exact: products are not made by matrix instructions (float32 without tf32).
        shared_memory: bytes that a program may use.
    """
    bk = _cheapest(depths, _depths(itemsize, exact), STEP_OVERHEAD)
    bn = _cheapest(columns, _columns(itemsize, exact), COLUMN_OVERHEAD)
    # 128 accumulators a thread would leave too few registers for the loop.
    bm = 128 if bn <= 64 and not exact and itemsize < 8 else 64
    return GemmTile(bm, bn, bk, WARPS, _stages((bm + bn) * bk * itemsize, shared_memory))


FINISH_STEPS = 8
"""Cost of launching the kernel that adds up split sums, in steps."""

WORKSPACE_READING = 8
"""Cost of writing or reading a sum, as a multiple of that of reading a value from the L2 cache."""

MOST_SPLITS = 32


@lru_cache(maxsize=4096)
def gemm_splits(
    tile: tuple[int, int, int],
    programs: int,
    steps: int,
    most: int,
    sums: int,
    reading: int,
    multiprocessors: int,
) -> int:
    """Programs that share the steps of a tile, so that few tiles fill the device: the number that is least work.

    Args:
        tile: its rows, columns and depth.
        programs: tiles, of all jobs.
        steps: of the longest job.
        most: programs that may share a tile.
        sums: of each split.
        reading: as in :func:`gemm_work`.
        multiprocessors: of the device.
    """
    rows, columns, depth = tile
    step = depth * (rows * columns + reading * (rows + columns))
    each_split = 2 * sums * WORKSPACE_READING * reading / multiprocessors  # written and read

    def work(splits: int) -> float:
        rounds = max(1, programs * splits / multiprocessors)
        products = rounds * (PROGRAM_OVERHEAD + -(-steps // splits)) * step
        return products if splits == 1 else products + FINISH_STEPS * step + splits * each_split

    best = min(range(1, max(1, min(most, steps, MOST_SPLITS)) + 1), key=work)
    return -(-steps // -(-steps // best))  # none without steps


def reading(arch: int | str, exact: bool) -> int:
    """Cost of reading a value, in products; see :data:`READING`. ``exact`` as in :func:`gemm_tile`."""
    return 4 if exact else READING.get(arch, 8 if isinstance(arch, int) else 16)


def gemm_work(tile: GemmTile, columns: Sequence[int], steps: float, reading: int) -> float:
    """Counted work of a tile for each position written, in products: padded ones, and reads from the L2 cache.

    Args:
        columns: as in :func:`gemm_tile`.
        steps: of a program.
        reading: products that cost as much as reading a value.
    """
    programs = sum(-(-width // tile.bn) for width in columns)
    return programs * (PROGRAM_OVERHEAD + steps) * tile.bk * (tile.bn + reading * (1 + tile.bn / tile.bm))


def weight_tile(
    group_in: int, columns: Sequence[int], taps: int, itemsize: int, exact: bool, shared_memory: int
) -> WeightTile:
    """Tile of the weight gradient.

    Args:
        group_in: input channels of a group.
        columns: output channels of each run of one view and group.
        taps: of a kernel row.
        itemsize, exact, shared_memory: as in :func:`gemm_tile`.
    """
    bo = _cheapest(columns, (16, 32), COLUMN_OVERHEAD)
    # 64 rows take Hopper's wgmma, which reads 32-bit operands along the depth only; theirs lie along the channels.
    bc = 64 if group_in > 32 and itemsize == 2 else 32
    bk = 64 if itemsize == 2 else 32
    if exact or itemsize == 8:
        bc, bk = 32, 16
    shared = 3 if taps > 1 else 1
    return WeightTile(bc, bo, bk, shared, WARPS, _stages((shared * bc + bo) * bk * itemsize, shared_memory))


def weight_work(tile: WeightTile, columns: Sequence[int], tap_rows: int, reading: int) -> float:
    """:func:`gemm_work` of the weight gradient for each input channel and position.

    Args:
        columns: as in :func:`weight_tile`.
        tap_rows: programs that compute the taps of one tile of channels.
        reading: as in :func:`gemm_work`.
    """
    programs = sum(-(-width // tile.bo) for width in columns) * tap_rows
    return programs * (tile.taps * (tile.bo + reading) + reading * tile.bo / tile.bc)


@lru_cache(maxsize=4096)
def box(size: Sequence[int], positions: int) -> tuple[int, ...]:
    """Extents, powers of two with the product ``positions``, of the boxes that cover ``size`` with the least waste.

    ``size`` is ``(N, D, H, W)``; boxes hold a divisor of ``N``. Of equals, the one with the longest runs of memory.
    """
    best = None
    for log_w, log_h, log_d in product(range(positions.bit_length()), repeat=3):
        rest = positions.bit_length() - 1 - log_w - log_h - log_d
        if rest >= 0 and size[0] % (1 << rest) == 0:
            extents = (1 << rest, 1 << log_d, 1 << log_h, 1 << log_w)
            cost = prod(-(-n // extent) for n, extent in zip(size, extents, strict=True))
            candidate = cost, tuple(-extent for extent in reversed(extents))
            best = candidate if best is None else min(best, candidate)
    return tuple(-extent for extent in reversed(best[1]))


def steps_per_split(jobs: int, steps: int, most: int, multiprocessors: int) -> int:
    """Steps that a program of the weight gradient makes, with ``most`` splits at most.

    Two programs a multiprocessor, as many as are there at a time: each further one would only write, and have
    read again, partial sums of its own.
    """
    splits = max(1, min(2 * multiprocessors // jobs, most, steps // LEAST_STEPS))
    return -(-steps // splits)


def gemm_tiles(itemsize: int, exact: bool, shared_memory: int) -> list[GemmTile]:
    """Every tile that :func:`gemm_tile` can choose for a dtype and device."""
    return list(
        dict.fromkeys(
            gemm_tile([columns], [depth], itemsize, exact, shared_memory)
            for columns in _columns(itemsize, exact)
            for depth in _depths(itemsize, exact)
        )
    )


def weight_tiles(itemsize: int, exact: bool, shared_memory: int) -> list[WeightTile]:
    """Every tile that :func:`weight_tile` can choose for a dtype and device."""
    return sorted(
        {
            weight_tile(group_in, [columns], taps, itemsize, exact, shared_memory)
            for group_in in (32, 64)
            for columns in (16, 32)
            for taps in (1, 3)
        },
        key=lambda tile: (tile.bc, tile.bo, tile.bk, tile.taps),
    )
