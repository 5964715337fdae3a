"""Lifting: a 2D network run on volumes, unchanged.

A channels-last batch of volumes ``(N, C, D, H, W)`` is byte for byte a batch of slices
``(N * D, C, H, W)``. :func:`convert` lets the network run on that batch and rewrites, while it
runs, the operations that mix positions: convolutions become ACS (or another kind), pooling,
padding and interpolation become three-dimensional, means over the plane become means over the
volume. Attention stays within slices. What has no rule is refused with :class:`LiftingError`.
"""

from .errors import LiftingError
from .modules import convert, is_lifted
from .options import KINDS
from .report import check_lifting, describe

__all__ = ["KINDS", "LiftingError", "check_lifting", "convert", "describe", "is_lifted"]
