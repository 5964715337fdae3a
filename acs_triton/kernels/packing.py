"""Packed weights of the matrix kernels: a block of memory for each step, in the order in which steps multiply them.

A GEMM's step multiplies a tile's rows by channels at one tap. Its weights are ``(rows, bk)``: forward, rows are
output channels and ``bk`` input channels follow each other; in the input gradient it is the other way round. One
launch writes all steps, zeros included, and merges taps (:mod:`acs_triton.merging`) on the way: where a merged
position is no tap of a channel's view it has a zero, and where mixed views share it the sum of their weights.

The kernel goes through all taps of a block of channels, which lie together in a weight: L1 has them from the first
tap on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..frozen import once
from ..geometry import MERGED, Geometry
from . import gather_tables
from .partials import triton_accumulator

SIDE = 16
"""Channels of a program, on the side that is not a step's depth."""


@triton.jit(
    do_not_specialize=["taps", "places", "channels", "tiles", "rows", "of_channel"],
    do_not_specialize_on_alignment=["p_w", "p_packed", "p_outputs", "p_numbers", "p_steps"],
)
def pack_kernel(
    p_w,  # (O, C/groups, of_channel)
    p_packed,  # (steps, rows, BK)
    p_outputs,  # (places,): output channels, or any where there is none
    p_numbers,  # (VIEWS, taps, places): which of the channel's taps, or -1: none
    p_steps,  # (blocks, taps): the step of a block and tap, or -1: none
    taps,
    places,  # output channels, with what fills up tiles or blocks
    channels,  # C/groups
    tiles,  # of input channels
    rows,
    of_channel,  # taps, those of all views
    BK: tl.constexpr,
    SIDE: tl.constexpr,
    VIEWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # of the input gradient: its depth is output channels
    ACCUMULATOR: tl.constexpr,
):
    PLACES: tl.constexpr = BK if TRANSPOSED else SIDE
    CHANNELS: tl.constexpr = SIDE if TRANSPOSED else BK
    of_place = tl.program_id(0) // tiles
    of_input = tl.program_id(0) % tiles
    place = of_place * PLACES + tl.arange(0, PLACES)
    c = of_input * CHANNELS + tl.arange(0, CHANNELS)
    o_place = tl.load(p_outputs + place, mask=place < places, other=0) * (channels * of_channel)
    o_w = o_place[:, None] + (c * of_channel)[None, :]
    m_c = (c < channels)[None, :]
    if TRANSPOSED:
        block = of_place
        o_packed = (c * BK)[:, None] + tl.arange(0, BK)[None, :]
        m_packed = (c < rows)[:, None]
    else:
        block = of_input
        o_packed = (place * BK)[:, None] + tl.arange(0, BK)[None, :]
        m_packed = (place < rows)[:, None]
    # A tap's table entries are loaded while the one before is packed, the one past the end never used.
    p_steps += block * taps
    step = tl.load(p_steps)
    number = _number(p_numbers, 0, place, places)
    for tap in range(taps):
        ahead = tl.minimum(tap + 1, taps - 1)
        next_step = tl.load(p_steps + ahead)
        next_number = _number(p_numbers, ahead, place, places)
        values = _gather(p_w, o_w, number, m_c)
        if VIEWS == 3:
            values = values.to(ACCUMULATOR)
            for view in tl.static_range(1, VIEWS):
                other = _number(p_numbers, view * taps + tap, place, places)
                values += _gather(p_w, o_w, other, m_c)
        values = values.to(p_packed.dtype.element_ty)
        if TRANSPOSED:
            values = tl.trans(values)
        p_step = tl.multiple_of(p_packed + step.to(tl.int64) * rows * BK, 16)
        tl.store(p_step + o_packed, values, mask=m_packed & (step >= 0))
        step = next_step
        number = next_number


@triton.jit
def _number(p_numbers, tap, place, places):
    return tl.load(p_numbers + tap * places + place, mask=place < places, other=-1)


@triton.jit
def _gather(p_w, o_w, number, m_c):
    """One tap's weights of (places, input channels); zeros where a place has no such tap."""
    return tl.load(p_w + (o_w + number[:, None]), mask=(number >= 0)[:, None] & m_c, other=0.0)


@dataclass(frozen=True)
class Packing:
    """How weights are packed for one tile.

    Attributes:
        outputs, numbers, steps: the kernel's tables, int32.
        count: number of steps.
        rows: of each.
        transposed: whether for the input gradient.
    """

    outputs: Tensor
    numbers: Tensor
    steps: Tensor
    count: int
    rows: int
    transposed: bool


def _packing(
    geometry: Geometry, merged: bool, place_of: Sequence[int], places: int, steps, rows: int, transposed: bool, where
) -> Packing:
    """Of output channels at ``place_of`` among ``places``; ``steps`` has a row for each block."""
    each = geometry.tap_count(0)
    outputs = np.zeros(places)
    outputs[np.array(place_of)] = np.arange(len(place_of))
    numbers = np.full((3 if geometry.mixed else 1, steps.shape[1], places), -1)
    views = ((0, 0, len(place_of)),)
    if geometry.mixed:
        views = tuple((view, 0, len(place_of)) for view in range(3))
    elif merged:
        views = geometry.views
    for view, first, end in views:
        layer, before = (numbers[view], view * each) if geometry.mixed else (numbers[0], 0)
        for tap, number in enumerate(geometry.merged.number[view] if merged else range(each)):
            layer[number, place_of[first:end]] = before + tap
    tables = (torch.from_numpy(values.astype(np.int32)).to(where) for values in (outputs, numbers, steps))
    return Packing(*tables, int(steps.max()) + 1, rows, transposed)


def forward(geometry, in_channels: int, out_channels: int, columns: int, tile, where: torch.device) -> Packing:
    """Of the convolution, for tiles of ``columns`` output channels; all taps of all blocks in order."""
    place_of, rows = gather_tables.packed_rows(geometry, out_channels, columns, tile.merged)
    blocks = -(-in_channels // geometry.groups // tile.bk)
    steps = np.arange(geometry.tap_count(MERGED if tile.merged else 0))[None, :] * blocks + np.arange(blocks)[:, None]
    return _packing(geometry, tile.merged, place_of, rows, steps, rows, False, where)


def input_grad(
    geometry, in_channels: int, out_channels: int, columns: int, tile, vector: int, made, where: torch.device
) -> Packing:
    """Of the input gradient, for tiles of ``columns`` input channels: the steps ``(group, tap, block)`` in ``made``.

    A tap may reach no position at a stride: then no step has it.
    """
    place_of, blocks = gather_tables.packed_channels(geometry, out_channels, tile.bk, vector, tile.merged)
    steps = np.full((geometry.groups * blocks, geometry.tap_count(MERGED if tile.merged else 0)), -1)
    for step, (group, tap, block) in enumerate(made):
        steps[group * blocks + block, tap] = step
    rows = -(-in_channels // geometry.groups // columns) * columns
    return _packing(geometry, tile.merged, place_of, steps.shape[0] * tile.bk, steps, rows, True, where)


def pack(weight: Tensor, packing: Packing, bk: int) -> Tensor:
    """``(O, C/groups, ku, kv)``, for mixed views ``(O, C/groups, 3, ku, kv)``, to ``(steps, rows, bk)``."""
    channels, (views, taps, places) = weight.shape[1], packing.numbers.shape
    packed = weight.new_empty(packing.count, packing.rows, bk)
    tiles = triton.cdiv(packing.rows, SIDE) if packing.transposed else triton.cdiv(channels, bk)
    blocks = triton.cdiv(places, bk if packing.transposed else SIDE)
    pack_kernel[(blocks * tiles,)](
        weight.contiguous(),
        packed,
        packing.outputs,
        packing.numbers,
        packing.steps,
        taps,
        places,
        channels,
        tiles,
        packing.rows,
        weight.shape[2:].numel(),
        BK=bk,
        SIDE=SIDE,
        VIEWS=views,
        TRANSPOSED=packing.transposed,
        ACCUMULATOR=triton_accumulator(weight.dtype),
    )
    return packed


def packed_once(weight: Tensor, geometry: Geometry, packing: Packing, tile) -> Tensor:
    """:func:`pack` for the convolution; kept with frozen weights."""
    # What the packing depends on; it is the same for volumes of all sizes, but for merged taps.
    regions = gather_tables.regions(geometry, weight.shape[0], tile.merged)
    merged = (geometry.views, geometry.merged.number) if tile.merged else ()
    return once(weight, (tile, regions, merged), lambda: pack(weight, packing, tile.bk))
