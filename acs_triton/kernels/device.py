"""What Triton drives here: a GPU, an emulated or offline target, or the interpreter.

The answer comes from Triton's active driver and never from ``tensor.is_cuda``, so the same launch
path serves hardware, drivers that compile without a GPU, and ``TRITON_INTERPRET=1`` on the CPU.
This module imports where Triton is not installed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

try:
    import triton
except ImportError:
    triton = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET`` was set when the kernels were decorated."""

MINIMUM_CAPABILITY = 80
AMD = ("gfx90a", "gfx942", "gfx950")


@dataclass(frozen=True)
class Device:
    """A device that Triton launches on.

    Attributes:
        torch_device: where its tensors live (the CPU under the interpreter).
        backend: Triton's name of the target: ``"cuda"``, ``"hip"`` or ``"interpreter"``.
        arch: compute capability as an integer (``90``), or the name of an AMD target (``"gfx942"``).
        shared_memory: bytes that one program may use.
        multiprocessors: number of streaming multiprocessors (compute units).
    """

    torch_device: torch.device
    backend: str
    arch: int | str
    shared_memory: int
    multiprocessors: int

    @property
    def interpreted(self) -> bool:
        return self.backend == "interpreter"

    @property
    def hardware(self) -> bool:
        """Whether kernels run on a real GPU."""
        return self.torch_device.type == "cuda"


_INTERPRETER = Device(torch.device("cpu"), "interpreter", 80, 166912, 2)


def current() -> Device:
    """The device that Triton drives.

    Raises:
        RuntimeError: there is none, or the kernels do not support it; the text is :func:`why_not`'s.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    return _INTERPRETER if INTERPRETED else _facts(triton.runtime.driver.active, _index())


def why_not() -> str | None:
    """One sentence on why no kernel can be launched here, or None if they can."""
    if triton is None:
        return "Triton is not installed (pip install triton)"
    if INTERPRETED:
        return None
    if _no_driver and triton.runtime.driver._active is None:
        return _no_driver[0]
    try:
        facts = _facts(triton.runtime.driver.active, _index())
    except Exception as error:  # no GPU, no C compiler, no headers of Python or CUDA: Triton has many ways to say so
        reason = " ".join(str(error).split()) or type(error).__name__
        _no_driver[:] = [f"Triton has no active driver on this machine: {reason}"]
        return _no_driver[0]
    if facts.backend == "cuda" and facts.arch < MINIMUM_CAPABILITY:
        return (
            f"the kernels need compute capability {MINIMUM_CAPABILITY // 10}.0 or newer, this GPU has "
            f"{facts.arch // 10}.{facts.arch % 10}: Triton has no tensor-core path for it"
        )
    if facts.backend == "hip" and not str(facts.arch).startswith(AMD):
        return f"the kernels support AMD's {', '.join(AMD)}, this GPU is {facts.arch}"
    return None


_no_driver: list[str] = []
"""Why Triton found no driver. It would compile its own again for each call."""


def _index() -> int:
    return triton.runtime.driver.active.get_current_device()


@lru_cache(maxsize=64)
def _facts(driver, index: int) -> Device:
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    return Device(
        torch_device=torch.device(driver.get_active_torch_device().type),
        backend=target.backend,
        arch=target.arch,
        shared_memory=properties["max_shared_mem"],
        multiprocessors=properties["multiprocessor_count"],
    )


def of(tensor: torch.Tensor) -> AbstractContextManager:
    """A context in which launches go to the tensor's own device (and its current stream)."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """How a float32 dot product rounds its operands: what ``torch.backends.cudnn`` allows convolutions."""
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and tf32 and current().backend != "hip" else "ieee"


def exact(dtype: torch.dtype) -> bool:
    """Whether products are made without matrix instructions: float32 where tf32 is not allowed."""
    return dtype == torch.float32 and dot_precision(dtype) == "ieee"


def upcast(dtype: torch.dtype) -> bool:
    """Whether dot operands are widened to float32: the interpreter multiplies the bit patterns of bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def all_registers() -> dict[str, int]:
    """Launch option for kernels with many accumulators: ptxas would spill some for more programs at a time."""
    return {"maxnreg": 255} if current().backend == "cuda" else {}
