"""What a launch executes: multiply-adds, traffic between L2 and the multiprocessors, bytes of memory.

Counted from the launch's own arguments: its tables, tile and grid. What is modelled here is what
the kernels' source and a GPU's memory system do with them, and the tests compare it with what the
compiled kernels do on an emulated GPU. L2 traffic counts the 32-byte sectors of each warp's
request; loads through L1 count once a program (an L1 that forgets nothing), asynchronous copies of
16 bytes pass it by.
"""

from __future__ import annotations

from collections.abc import Callable

from . import direct, matrix
from .launches import Launch
from .traffic import Arguments, Work

_COUNTS: dict[str, Callable[[Arguments, int], Work]] = {
    "gather_gemm_kernel": matrix.gathered_gemm,
    "descriptor_gemm_kernel": matrix.fetched_gemm,
    "finish_kernel": matrix.finish,
    "pack_kernel": matrix.pack,
    "weight_grad_kernel": matrix.gathered_weight_grad,
    "descriptor_weight_grad_kernel": matrix.fetched_weight_grad,
    "add_splits_kernel": matrix.add_splits,
    "depthwise_conv_kernel": direct.depthwise_conv,
    "depthwise_weight_grad_kernel": direct.depthwise_weight_grad,
    "stem_conv_kernel": direct.stem_conv,
    "stem_weight_grad_kernel": direct.stem_weight_grad,
    "sum_partials_kernel": direct.sum_partials,
    "layout_conversion_kernel": direct.layout_conversion,
}
"""By a kernel's name: its work from a launch's arguments and its number of programs."""


def count(launch: Launch) -> Work:
    """The work of one launch.

    Raises:
        NotImplementedError: it is not known how to count this kernel, or this memory format.
    """
    if launch.kernel not in _COUNTS:
        raise NotImplementedError(f"no count is known for {launch.kernel}; add one to {__name__}")
    return _COUNTS[launch.kernel](Arguments(launch.arguments), launch.programs)
