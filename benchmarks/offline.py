"""GPUs that are not there: a Triton driver that specialises and compiles, but has nothing to run on.

Inside ``with offline("sm_90") as gpu:`` Triton's active driver names that target and the torch
device ``meta``. The library's ordinary launch path then runs unchanged on meta tensors: it picks
tiles, builds its plans, specialises and compiles each kernel for the target; a launch is only
noted. Whatever reads a value back from the device fails there, as a synchronisation would show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver


@dataclass(frozen=True)
class Arch:
    """Limits of one GPU, from its vendor's documentation.

    Attributes:
        target: what Triton compiles for.
        device_name: the GPU that the figures belong to.
        multiprocessors: streaming multiprocessors (compute units).
        shared_per_block, shared_per_multiprocessor: bytes.
        warps, blocks: resident on one multiprocessor at most.
        registers: 32-bit registers for each lane of one scheduler's (SIMD's) warps together.
        register_granule: registers a lane are allocated in multiples of this.
        schedulers: of one multiprocessor, each with its own registers.
        reserved_shared: bytes of shared memory that the system takes from each block.
    """

    target: GPUTarget
    device_name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    warps: int
    blocks: int
    registers: int = 512
    register_granule: int = 8
    schedulers: int = 4
    reserved_shared: int = 1024

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """Resident warps as a share of the most there can be, as registers, shared memory and block slots allow."""
        granule = self.register_granule
        per_scheduler = self.registers // max(granule, -(-registers // granule) * granule)
        by_registers = min(per_scheduler * self.schedulers, self.warps) // num_warps
        by_shared = self.shared_per_multiprocessor // max(shared + self.reserved_shared, 1)
        return min(by_registers, by_shared, self.blocks, self.warps // num_warps) * num_warps / self.warps


def _nvidia(capability: int, name: str, multiprocessors: int, shared_kib: int, warps: int, blocks: int) -> Arch:
    target = GPUTarget("cuda", capability, 32)
    # A block can have all of a multiprocessor's shared memory but the KiB that the system reserves.
    return Arch(target, name, multiprocessors, (shared_kib - 1) * 1024, shared_kib * 1024, warps, blocks)


ARCHS = {
    "sm_80": _nvidia(80, "A100", 108, 164, 64, 32),
    "sm_86": _nvidia(86, "RTX 3090", 82, 100, 48, 16),
    "sm_89": _nvidia(89, "RTX 4090", 128, 100, 48, 24),
    "sm_90": _nvidia(90, "H100", 132, 228, 64, 32),
    "sm_100": _nvidia(100, "B200", 148, 228, 64, 32),
    "sm_120": _nvidia(120, "RTX 5090", 170, 100, 48, 24),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), "MI300X", 304, 65536, 65536, 32, 32, reserved_shared=0),
}


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    Attributes:
        kernel: the Python function's name.
        arch: a key of :data:`ARCHS`.
        digest: Triton's hash of source, signature, constants and options.
        signature: argument name -> Triton type (``"constexpr"`` for constants).
        constants: argument name -> value, of the constexprs and of the arguments equal to 1.
        num_warps, num_stages, shared: as compiled; shared memory in bytes.
        files: kind (``"ptx"``, ``"cubin"``, ``"amdgcn"``, ``"hsaco"``, ...) -> path.
    """

    kernel: str
    arch: str
    digest: str
    signature: dict[str, str] = field(hash=False)
    constants: dict[str, Any] = field(hash=False)
    num_warps: int
    num_stages: int
    shared: int
    files: dict[str, Path] = field(hash=False, repr=False)

    @cached_property
    def machine_code(self) -> Path:
        """The file a GPU would load."""
        return self.files["cubin" if "cubin" in self.files else "hsaco"]


class _Utilities:
    """The part of a driver that Triton asks about device properties and loaded binaries."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self.arch.shared_per_block,
            "multiprocessor_count": self.arch.multiprocessors,
            "warpSize": self.arch.target.warp_size,
            "max_num_regs": self.arch.registers * self.arch.schedulers * self.arch.target.warp_size,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass


class OfflineDriver(DriverBase):
    """A driver of one :class:`Arch` that records what is compiled and launched.

    Attributes:
        binaries: every :class:`Binary`, in the order in which the launches first asked for them.
        launches: ``(binary's digest, grid)`` of every launch.
    """

    # JITFunction keeps its compiled kernels, and the target it compiles for, by device index.
    _ordinals = itertools.count()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.arch = name, ARCHS[name]
        self.utils = _Utilities(self.arch)
        self.binaries: list[Binary] = []
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self._ordinal = next(self._ordinals)

    @classmethod
    def is_active(cls) -> bool:
        return False  # only ever set by hand

    def get_current_target(self) -> GPUTarget:
        return self.arch.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self) -> int:
        return self._ordinal

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        raise RuntimeError(f"{self.name} is offline: kernels are compiled for it, not run, so there is nothing to time")

    def launcher_cls(self, source, metadata):
        def launch(grid_x, grid_y, grid_z, *rest) -> None:
            if not (0 < grid_x < 2**31 and 0 < grid_y < 2**16 and 0 < grid_z < 2**16):
                raise ValueError(f"{metadata.name}: grid ({grid_x}, {grid_y}, {grid_z}) is outside CUDA's limits")
            self.launches.append((metadata.hash, (grid_x, grid_y, grid_z)))

        return launch

    def record(self, *, src, metadata: dict[str, Any], metadata_group: dict[str, str], **times) -> None:
        """Compilation listener (``triton.knobs.compilation.listener``)."""
        names = src.fn.arg_names
        self.binaries.append(
            Binary(
                kernel=src.fn.fn.__name__,
                arch=self.name,
                digest=metadata["hash"],
                signature=dict(src.signature),
                constants={names[path[0]]: value for path, value in src.constants.items()},
                num_warps=metadata["num_warps"],
                num_stages=metadata["num_stages"],
                shared=metadata["shared"],
                files={Path(path).suffix[1:]: Path(path) for path in metadata_group.values()},
            )
        )


@contextmanager
def offline(name: str) -> Iterator[OfflineDriver]:
    """Make Triton compile for ``name``, a key of :data:`ARCHS`, with no GPU.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the interpreter replaces the compiler in this process.
    """
    if name not in ARCHS:
        raise ValueError(f"arch={name!r} is not known; use one of {', '.join(ARCHS)}")
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled; unset it for this process")
    gpu = OfflineDriver(name)
    # Reading `driver.active` would look for a real GPU and fail where there is none.
    previous, listener = driver._active, knobs.compilation.listener
    driver.set_active(gpu)
    knobs.compilation.listener = gpu.record
    try:
        yield gpu
    finally:
        driver._active, knobs.compilation.listener = previous, listener
