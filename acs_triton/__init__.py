"""ACS convolution fused in Triton, and a converter that runs 2D networks on volumes."""

from . import functional, operators
from .backends import current_backend, use_backend

__version__ = "0.1.0"
__all__ = ["current_backend", "functional", "operators", "use_backend"]
