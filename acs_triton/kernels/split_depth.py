"""Split depth: several programs share the steps of a tile, and a second kernel adds up their sums.

Layers of few positions have fewer tiles than the device has multiprocessors. Smaller tiles would fill it
too, but read each value more often, and each is another binary. The sums are added in a fixed order: the same
call gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device, tiles
from .epilogue import activated
from .partials import accumulator


@triton.jit
def split_steps(steps, split, splits):
    """First step and number of steps of a split: as many in each, fewer or none in the last ones."""
    each = (steps + splits - 1) // splits
    first = tl.minimum(split * each, steps)
    return first, tl.minimum(each, steps - first)


SUM_VECTOR = tl.constexpr(4)
"""Float32 values in 16 bytes."""


@triton.jit
def store_sums(p_sums, acc, row, m_row, columns, job, column_tiles):
    """Write a tile's sums: its rows, and its columns, of which there are ``columns``, beside those of the other tiles.

    Whatever the output's format, so that one way to store them needs few registers.
    """
    COLUMNS: tl.constexpr = acc.shape[1]
    o_n = tl.arange(0, COLUMNS)
    p_sums = tl.multiple_of(p_sums, 16) + job % column_tiles * COLUMNS
    p_sums += (row * (column_tiles * COLUMNS))[:, None] + o_n[None, :]
    m_n = o_n // SUM_VECTOR < (columns + SUM_VECTOR - 1) // SUM_VECTOR  # whole vectors
    tl.store(p_sums, acc, mask=m_row[:, None] & m_n[None, :])


def sum_places(columns: Sequence[tuple[int, int]], width: int) -> tuple[int, list[int]]:
    """Number of different tiles of columns among jobs, and where their sums have each channel's.

    Args:
        columns: first channel of each job, and their number.
        width: columns of a tile.
    """
    distinct = list(dict.fromkeys(columns))
    places = {first + i: tile * width + i for tile, (first, count) in enumerate(distinct) for i in range(count)}
    return len(distinct), [places[channel] for channel in range(len(places))]


def count(tile: tuple[int, int, int], programs: int, steps: int, output: Tensor, pitch: int) -> int:
    """Programs that share a tile of an output; see :func:`acs_triton.kernels.tiles.gemm_splits`.

    ``pitch`` is the number of all tiles' columns.
    """
    facts = device.current()
    reading = tiles.reading(facts.arch, device.exact(output.dtype))
    most = tiles.MAX_WORKSPACE // (_rows(output) * pitch * accumulator(output.dtype).itemsize)
    return tiles.gemm_splits(tile, programs, steps, most, output.numel(), reading, facts.multiprocessors)


def _rows(output: Tensor) -> int:
    return output.shape[0] * math.prod(output.shape[2:])


def sums(output: Tensor, splits: int, pitch: int) -> Tensor:
    """Memory for the sums of each split; where there is one, memory that nothing reads or writes."""
    dtype = accumulator(output.dtype)
    if splits == 1:
        return _nothing(dtype, output.device)
    return torch.empty((splits, _rows(output), pitch), dtype=dtype, device=output.device)


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, where: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=where)


def finish(sums: Tensor, places: Tensor, bias: Tensor | None, output: Tensor, y_unit: int, activation: str) -> None:
    """Add up the sums of each split and the bias, activate, and round.

    Args:
        sums: ``(splits, rows, columns)``, of :func:`sums`.
        places: of :func:`sum_places`.
        bias: ``(O,)`` or None.
        output: ``(N, O, D, H, W)``, dense.
        y_unit: the ``Y_UNIT`` of the kernel that made the sums.
        activation: of :data:`acs_triton.activations.ACTIVATIONS`, or none.
    """
    positions, channels = math.prod(output.shape[2:]), output.shape[1]
    grid = triton.cdiv(positions, POSITIONS) * triton.cdiv(channels, CHANNELS) * output.shape[0]
    finish_kernel[(grid,)](
        sums,
        places,
        output if bias is None else bias,
        output,
        *sums.shape,
        positions,
        channels,
        int(bias is not None),
        Y_UNIT=y_unit,
        ACTIVATION=activation,
        SPLITS=SPLITS,
        POSITIONS=POSITIONS,
        CHANNELS=CHANNELS,
        num_warps=tiles.WARPS,
        **device.all_registers(),
    )


SPLITS, POSITIONS, CHANNELS = 4, 16, 64
"""What a program that adds up sums reads at a time, and writes; one split at a time would wait for each load."""


@triton.jit(
    do_not_specialize=["splits", "rows", "pitch", "positions", "channels", "biased"],
    do_not_specialize_on_alignment=["p_sums", "p_places", "p_bias", "p_y"],
)
def finish_kernel(
    p_sums,  # (splits, rows, pitch)
    p_places,  # (channels,): columns of the sums
    p_bias,  # (channels,), where biased
    p_y,
    splits,
    rows,
    pitch,
    positions,  # of a sample
    channels,
    biased,
    Y_UNIT: tl.constexpr,  # as in the kernels that make the sums
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = (channels + CHANNELS - 1) // CHANNELS
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    program = program // blocks
    blocks = (positions + POSITIONS - 1) // POSITIONS
    position = program % blocks * POSITIONS + tl.arange(0, POSITIONS)
    sample = program // blocks
    UNIT: tl.constexpr = max(Y_UNIT, 1)
    m_c = c // UNIT < channels // UNIT
    mask = (position < positions)[:, None] & m_c[None, :]

    at = (sample * positions + position)[:, None] * pitch + tl.load(p_places + c, mask=m_c, other=0)[None, :]
    acc = tl.zeros([POSITIONS, CHANNELS], p_sums.dtype.element_ty)
    for split in range(0, splits, SPLITS):
        s = split + tl.arange(0, SPLITS)
        m_s = (s < splits)[:, None, None] & mask[None, :, :]
        b_sums = tl.load(p_sums + (s * rows * pitch)[:, None, None] + at[None, :, :], mask=m_s, other=0.0)
        acc += tl.sum(b_sums, axis=0)
    acc += tl.load(p_bias + c, mask=m_c & (biased != 0), other=0.0).to(acc.dtype)[None, :]
    b_y = activated(acc, ACTIVATION).to(p_y.dtype.element_ty)
    p_y += sample * positions * (channels // UNIT) * UNIT
    if Y_UNIT > 1:
        p_y = tl.multiple_of(p_y, 16)
    if Y_UNIT > 0:
        p_y += (position * (channels // UNIT) * UNIT)[:, None] + c[None, :]
    else:
        p_y += position[:, None] + (c * positions)[None, :]
    tl.store(p_y, b_y, mask=mask)
