"""What the kernels share: the accumulator, the width of offsets, and sums in two stages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import MAX_WORKSPACE


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    """:func:`accumulator` in Triton's terms."""
    return tl.float64 if accumulator(dtype) == torch.float64 else tl.float32


def needs_int64(*tensors: torch.Tensor) -> bool:
    """Whether an offset within one sample of ``(N, C, D, H, W)`` reaches 2**31."""
    return any(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31
        for t in tensors
    )


def splits(programs: int, boxes: int, outputs: int, multiprocessors: int) -> tuple[int, int]:
    """How a weight gradient cuts its positions: ``(boxes a program takes, number of cuts)``.

    About eight programs a multiprocessor fill the device several times over; at least four
    boxes each pay for the reduction at the end; the partial sums stay within
    :data:`~acs_triton.kernels.tiles.MAX_WORKSPACE`.

    Args:
        programs: needed for one cut.
        boxes: of all samples.
        outputs: elements of the weight gradient.
        multiprocessors: of the device.
    """
    cuts = min(8 * multiprocessors // programs, boxes // 4, MAX_WORKSPACE // (4 * outputs))
    each = -(-boxes // max(1, cuts))
    return each, -(-boxes // each)


def sum_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """``out = partials.sum(0)``, rounded once, always in the same order. Both contiguous."""
    # Sixteen cuts at a time: there are few elements and many cuts, and one by one would wait for each load.
    sum_partials_kernel[(triton.cdiv(out.numel(), 64),)](
        partials, out, out.numel(), partials.shape[0], CUTS=16, ELEMENTS=64
    )


@triton.jit(do_not_specialize=["elements", "cuts"])
def sum_partials_kernel(p_partial, p_out, elements, cuts, CUTS: tl.constexpr, ELEMENTS: tl.constexpr):
    e = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    acc = tl.zeros([CUTS, ELEMENTS], p_partial.dtype.element_ty)
    for first in range(0, cuts, CUTS):
        cut = first + tl.arange(0, CUTS)
        mask = (cut < cuts)[:, None] & (e < elements)[None, :]
        acc += tl.load(p_partial + cut[:, None] * elements + e[None, :], mask=mask, other=0.0)
    tl.store(p_out + e, tl.sum(acc, 0).to(p_out.dtype.element_ty), mask=e < elements)
