"""ACS convolution written out in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

It imports nothing of ``acs_triton`` and shares no code with it. ``definition`` follows the paper
tap by tap; ``dense`` reaches the same numbers by another way, one ``conv3d`` with an assembled
``(k, k, k)`` kernel, wherever such a kernel exists.
"""

from .definition import acs_conv3d, conv2_5d, soft_acs_conv3d
from .dense import dense_acs_conv3d, dense_soft_acs_conv3d

__all__ = ["acs_conv3d", "conv2_5d", "dense_acs_conv3d", "dense_soft_acs_conv3d", "soft_acs_conv3d"]
