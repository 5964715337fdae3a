"""Weights of merged taps: several views' kernels as one weight for each position that they read.

Where the views lie on one grid they share positions: three 3x3 kernels read 19 of them and not 27. For
mixed views (Soft ACS) the kernels of a position are added up; a standard ACS channel has zero weights
at the positions of the other views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry
from .tables import keep


@keep(maxsize=512)
def numbers(geometry: Geometry, where: torch.device) -> Tensor:
    """Which merged position a tap reads: ``(O, ku * kv)``, for mixed views ``(3, ku * kv)``; int64."""
    rows = geometry.merged.number
    if not geometry.mixed:
        rows = [rows[view] for view, first, end in geometry.views for _ in range(first, end)]
    return torch.tensor(rows, dtype=torch.int64).to(where)


def merge(weight: Tensor, geometry: Geometry) -> Tensor:
    """``(O, C/groups, ku, kv)``, for mixed views ``(O, C/groups, 3, ku, kv)``, to ``(O, C/groups, T)``.

    ``T`` positions in the order of ``geometry.merged``.
    """
    places = numbers(geometry, weight.device)
    merged = weight.new_zeros((*weight.shape[:2], len(geometry.merged.positions)))
    if not geometry.mixed:
        return merged.scatter_(2, places[:, None].expand(-1, weight.shape[1], -1), weight.flatten(2))
    for place, kernel in zip(places, weight.unbind(2), strict=True):
        # No position twice in one call: sums are made in the same order every time.
        merged.index_add_(2, place, kernel.flatten(2))
    return merged


def unmerge(gradient: Tensor, geometry: Geometry) -> Tensor:
    """The transpose of :func:`merge` for mixed views: the gradient of its result to that of its weight."""
    parts = [gradient.index_select(2, place) for place in numbers(geometry, gradient.device)]
    return torch.stack(parts, 2).unflatten(3, geometry.kernel_size)
