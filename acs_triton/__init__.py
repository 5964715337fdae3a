"""ACS convolution fused in Triton, and a converter that runs 2D networks on volumes."""

from . import converters, functional, operators
from .backends import current_backend, use_backend
from .explanation import explain
from .fusion import FusionError, fuse
from .lifting import LiftingError, check_lifting, convert, describe
from .standard import standard_operators

__version__ = "0.1.0"
__all__ = [
    "FusionError",
    "LiftingError",
    "check_lifting",
    "convert",
    "converters",
    "current_backend",
    "describe",
    "explain",
    "functional",
    "fuse",
    "operators",
    "standard_operators",
    "use_backend",
]
