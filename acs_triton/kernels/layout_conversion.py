"""Layout conversion: a tensor of any strides into the rows that the matrix kernels read, in one pass.

A tile of channels and positions is read along whichever of the two lies next to each other in memory, turned
over in shared memory, and written along the channels: each value is read once and written once, both in long
runs. The channels that fill up a group's last vector are written as zeros by the same stores.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .channels_last import strides, unit
from .partials import needs_int64

TILE_BYTES = 8192
"""Of a tile: 64 a thread. Sixteen programs that a multiprocessor runs at a time have 128 KiB on their way."""

RUN_BYTES = 64
"""Of channels in a tile at most: two sectors. So no tile is square, which would give loads the layout of the stores."""


# Sizes are no constants and not specialised on: one binary serves every volume.
@triton.jit(
    do_not_specialize=[
        "tiles", "blocks", "channels", "group_vectors", "row_vectors", "positions", "size_h", "size_w",
        "x_sample", "x_channel", "x_d", "x_h", "x_w",
    ]
)  # fmt: skip
def layout_conversion_kernel(
    p_x,
    p_y,  # rows (samples, positions, row_vectors * UNIT)
    tiles,  # that a row's columns make
    blocks,  # that a sample's positions make
    channels,  # of a group
    group_vectors,  # that hold a group's channels in a row
    row_vectors,
    positions,
    size_h,
    size_w,
    x_sample,  # strides count X_UNIT elements
    x_channel,
    x_d,
    x_h,
    x_w,
    UNIT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    X_UNIT: tl.constexpr,  # elements in the vectors that are read
    ALONG_CHANNELS: tl.constexpr,  # they are vectors of channels, else of positions
    FLAT: tl.constexpr,  # positions are one run of memory
    INT64: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // tiles
    sample = (block // blocks).to(tl.int64)
    first = block % blocks * BP
    i = tl.arange(0, BP)
    position = first + i
    column = program % tiles * BC + tl.arange(0, BC)
    m_column = column // UNIT < row_vectors
    group = column // (group_vectors * UNIT)
    channel = column - group * (group_vectors * UNIT)
    # Masks are the same throughout a vector; else the loads would be of single elements.
    m_position = position < positions
    m_channel = m_column & (channel < channels)
    channel += group * channels
    if ALONG_CHANNELS:
        m_channel = tl.max_constancy(m_channel, X_UNIT)
        channel = tl.max_contiguous(tl.multiple_of(channel, X_UNIT), X_UNIT)
    else:
        m_position = tl.max_constancy(m_position, X_UNIT)
    if not FLAT:
        d = position // (size_h * size_w)
        h = position // size_w % size_h
        w = position % size_w
        if INT64:
            d, h, w = d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
        position = (d * x_d + h * x_h + w * x_w) * X_UNIT
    p_x += sample * x_sample * X_UNIT
    if ALONG_CHANNELS:
        p_x += position[:, None] + channel[None, :]
        b_x = tl.load(p_x, mask=m_position[:, None] & m_channel[None, :], other=0.0)
    else:
        if INT64:
            channel = channel.to(tl.int64)
        p_x += (channel * x_channel * X_UNIT)[:, None] + position[None, :]
        b_x = tl.trans(tl.load(p_x, mask=m_channel[:, None] & m_position[None, :], other=0.0))
    pitch = row_vectors * UNIT
    p_y += (sample * positions + first) * pitch
    tl.store(p_y + (i * pitch)[:, None] + column[None, :], b_x, mask=m_position[:, None] & m_column[None, :])


def _is_run(tensor: Tensor) -> bool:
    """Whether the positions of ``(N, C, D, H, W)`` are one run of memory."""
    run = 1
    for size, stride in zip(tensor.shape[:1:-1], tensor.stride()[:1:-1], strict=True):
        if size > 1 and stride != run:
            return False
        run *= size
    return True


def _tile(columns: int, itemsize: int) -> tuple[int, int]:
    """Positions and channels of a tile for rows of so many columns."""
    width = min(triton.next_power_of_2(columns), RUN_BYTES // itemsize)
    return TILE_BYTES // itemsize // width, width


def convert(tensor: Tensor, groups: int = 1) -> Tensor:
    """``(N, C, D, H, W)`` of any strides as a new tensor in the format of :mod:`acs_triton.kernels.channels_last`.

    Returns:
        ``(N, groups * channels, D, H, W)`` in channels-last memory. ``channels`` are ``C / groups``, and as many
        zeros as make them whole vectors of 16 bytes.
    """
    samples, channels, *size = tensor.shape
    channels, vector = channels // groups, unit(tensor.dtype)
    group_vectors = -(-channels // vector)
    row = groups * group_vectors * vector
    rows = torch.empty((samples, *size, row), dtype=tensor.dtype, device=tensor.device)
    if not rows.numel():
        return rows.permute(0, 4, 1, 2, 3)
    positions, x_strides = math.prod(size), strides(tensor)
    along_channels = x_strides[1] == 1
    flat = not along_channels and _is_run(tensor)
    x_unit = 1
    if flat or along_channels:
        within = (positions, *x_strides[:2]) if flat else (channels, x_strides[0], *x_strides[2:])
        x_unit = math.gcd(vector, tensor.data_ptr() // tensor.dtype.itemsize, *within)
    bp, bc = _tile(row, tensor.dtype.itemsize)
    blocks, tiles = triton.cdiv(positions, bp), triton.cdiv(row, bc)
    with device.of(tensor):
        layout_conversion_kernel[(samples * blocks * tiles,)](
            tensor,
            rows,
            tiles,
            blocks,
            channels,
            group_vectors,
            groups * group_vectors,
            positions,
            *size[1:],
            *(stride // x_unit for stride in x_strides),
            UNIT=vector,
            BP=bp,
            BC=bc,
            X_UNIT=x_unit,
            ALONG_CHANNELS=along_channels,
            FLAT=flat,
            INT64=needs_int64(tensor),
        )
    return rows.permute(0, 4, 1, 2, 3)
