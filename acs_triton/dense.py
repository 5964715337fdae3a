"""The one dense ``(k, k, k)`` kernel that equals an ACS convolution, where there is one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Triple


def assemble(views: tuple[Tensor, Tensor, Tensor], centre: Triple) -> Tensor:
    """Sum of three 2D kernels ``(O, C, k, k)`` placed in the planes of a ``(O, C, k, k, k)`` kernel.

    Args:
        views: the axial, coronal and sagittal kernels.
        centre: the tap of each axis on which that axis's view lies (``Geometry.centre``).
    """
    placed = []
    for axis, kernel in enumerate(views):
        pads = [0] * 6
        pads[4 - 2 * axis : 6 - 2 * axis] = centre[axis], kernel.shape[-1] - 1 - centre[axis]
        placed.append(F.pad(kernel.unsqueeze(axis + 2), pads))
    return torch.stack(placed).sum(0)
