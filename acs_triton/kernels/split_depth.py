"""Split depth: several programs share the steps of a tile, and a second kernel adds up their sums.

Layers of few positions have fewer tiles than the device has multiprocessors. Smaller tiles would fill it
too, but read each value more often, and each is another binary. The sums are added in a fixed order: the same
call gives the same bits.
"""

from __future__ import annotations

import math
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


def count(tile: tuple[int, int, int], programs: int, steps: int, output: Tensor) -> int:
    """Programs that share a tile of an output; see :func:`acs_triton.kernels.tiles.gemm_splits`."""
    facts = device.current()
    reading = tiles.reading(facts.arch, device.exact(output.dtype))
    sum_bytes = accumulator(output.dtype).itemsize
    return tiles.gemm_splits(tile, programs, steps, output.numel(), sum_bytes, reading, facts.multiprocessors)


def sums(output: Tensor, splits: int) -> Tensor:
    """Memory for the sums of each split; where there is one, memory that nothing reads or writes."""
    dtype = accumulator(output.dtype)
    if splits == 1:
        return _nothing(dtype, output.device)
    return torch.empty(splits * output.numel(), dtype=dtype, device=output.device)


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, where: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=where)


@triton.constexpr_function
def sum_unit(y_unit: int) -> int:
    """As the kernels' ``Y_UNIT``, of the sums: channels are not last where the output's are no whole vectors.

    Single float32 values of many channels side by side need more addresses than there are registers.
    """
    return y_unit if y_unit > 1 else 0


def finish(sums: Tensor, splits: int, bias: Tensor | None, output: Tensor, y_unit: int, activation: str) -> None:
    """Add up the sums of each split and the bias, activate, and round.

    ``y_unit`` is the ``Y_UNIT`` of the kernel that made the sums.
    """
    positions, channels = math.prod(output.shape[2:]), output.shape[1]
    grid = triton.cdiv(positions, POSITIONS) * triton.cdiv(channels, CHANNELS) * output.shape[0]
    finish_kernel[(grid,)](
        sums,
        output if bias is None else bias,
        output,
        splits,
        positions,
        channels,
        output.numel(),
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
    do_not_specialize=["splits", "positions", "channels", "elements", "biased"],
    do_not_specialize_on_alignment=["p_bias", "p_y"],
)
def finish_kernel(
    p_sums,  # (splits, elements), each in the order that sum_unit says
    p_bias,  # (channels,), where biased
    p_y,
    splits,
    positions,
    channels,
    elements,
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
    first = program // blocks * positions * channels  # of the sample
    UNIT: tl.constexpr = max(Y_UNIT, 1)
    pitch = channels // UNIT * UNIT
    m_c = c // UNIT < channels // UNIT
    mask = (position < positions)[:, None] & m_c[None, :]

    SUM_UNIT: tl.constexpr = sum_unit(Y_UNIT)
    if SUM_UNIT > 0:
        elements = elements // UNIT * UNIT
        at = first // UNIT * UNIT + position[:, None] * pitch + c[None, :]
    else:
        at = first + position[:, None] + c[None, :] * positions
    acc = tl.zeros([POSITIONS, CHANNELS], p_sums.dtype.element_ty)
    for split in range(0, splits, SPLITS):
        s = split + tl.arange(0, SPLITS)
        m_s = (s < splits)[:, None, None] & mask[None, :, :]
        acc += tl.sum(tl.load(p_sums + (s * elements)[:, None, None] + at[None, :, :], mask=m_s, other=0.0), axis=0)
    acc += tl.load(p_bias + c, mask=m_c & (biased != 0), other=0.0).to(acc.dtype)[None, :]
    b_y = activated(acc, ACTIVATION).to(p_y.dtype.element_ty)
    if Y_UNIT > 0:
        at = first // UNIT * UNIT + position[:, None] * pitch + c[None, :]
    tl.store(p_y + at, b_y, mask=mask)
