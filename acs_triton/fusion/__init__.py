"""Networks for inference: batch norms folded into convolutions, activations into the end of their kernels.

Which batch norm follows which convolution is not read off a graph, since lifted networks have none, nor
guessed from names: one run of the network is watched, at the level where every operation that reads a
convolution's output is seen. What holds for one run need not hold for another input, so the fused
network cannot be wrong in silence: a fused convolution gives no tensor but a
:class:`~acs_triton.fusion.output.FusedOutput`, which only what was folded into it can read.
"""

from .modules import fuse
from .output import FusionError

__all__ = ["FusionError", "fuse"]
