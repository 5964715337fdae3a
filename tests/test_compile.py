"""Every kernel compiles for every target, without a GPU: tiles fit, nothing spills, the right instructions are used.

``pytest`` compiles what the usual layers launch for a part of the targets and dtypes;
``pytest -m compile_all`` every tile that can be chosen, for all of them.
"""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton")

from acs_triton.kernels import depthwise, depthwise_plan, device, stem, stem_plan, tiles
from benchmarks.disassembly import inspect
from benchmarks.kernel_report import tile_text
from benchmarks.offline import ARCHS, Binary, OfflineDriver, offline
from benchmarks.workloads import DTYPES, PRIMITIVES, TYPICAL, Layer, resnet50

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the compiler")

MATRIX = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "MFMA",
}
ROWS = {"gather_gemm_kernel": "BM", "weight_grad_kernel": "BC"}
"""The matrix kernels, and which of their constants is the number of rows of a tile."""

TARGETS = list(itertools.product(ARCHS, DTYPES))


def matrix_instruction(binary: Binary) -> str:
    """What the target multiplies a tile with; wgmma and tcgen05 need at least 64 rows."""
    small = binary.constants[ROWS[binary.kernel]] < 64
    return "HMMA" if small and binary.arch in ("sm_90", "sm_100") else MATRIX[binary.arch]


def faults(binary: Binary) -> list[str]:
    """What is wrong with a compiled kernel, in words; shared memory was checked when it was launched."""
    report = inspect(binary)
    found = []
    if report.spilled:
        found.append(f"spills {report.spilled} bytes ({report.registers} registers)")
    if binary.kernel in ROWS and binary.constants["PRECISION"] == "ieee" and binary.signature["p_x"] == "*fp32":
        if report.matrix and binary.arch != "gfx942":
            found.append(f"multiplies float32 with {report.matrix} where ieee was asked for")
    elif binary.kernel in ROWS:
        if report.matrix != matrix_instruction(binary):
            found.append(f"uses {report.matrix}, not {matrix_instruction(binary)}")
        if binary.arch != "gfx942" and not {"async 16", "tma"} & set(report.copies):
            found.append(f"has no asynchronous copies of 16 bytes: {report.copies}")
        # Entries of tables are single words; all else is moved in whole vectors.
        if narrow := {kind: count for kind, count in report.copies.items() if kind in ("async 4", "load 2", "load 1")}:
            found.append(f"has narrow copies: {narrow}")
    return [f"{binary.kernel} {tile_text(binary)} {binary.arch} {fault}" for fault in found]


def check(gpu: OfflineDriver) -> None:
    """Fail with every fault of every binary, once each."""
    assert gpu.binaries
    distinct = {binary.digest: binary for binary in gpu.binaries}
    found = [fault for binary in distinct.values() for fault in faults(binary)]
    assert not found, f"{len(found)} faults in {len(distinct)} binaries:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("arch", "dtype", "layers"),
    [
        ("sm_80", "fp16", TYPICAL),
        ("sm_90", "bf16", TYPICAL),
        ("sm_90", "fp32", TYPICAL[:1]),
        ("sm_100", "fp16", TYPICAL[:1]),
        ("sm_120", "fp32", TYPICAL[:1]),
        ("gfx942", "bf16", TYPICAL[:1]),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} layers",
)
def test_usual_layers(arch, dtype, layers):
    with offline(arch) as gpu:
        for layer, primitive in itertools.product(layers, PRIMITIVES):
            layer.run(primitive, DTYPES[dtype], device.current().torch_device)
    check(gpu)


@pytest.mark.parametrize(
    ("arch", "primitive", "arithmetic", "at_most"),
    [
        ("sm_80", "conv", 64, 225),
        ("sm_90", "conv", 8, 155),
        ("sm_80", "input_grad", 64, 225),
        ("sm_90", "input_grad", 8, 150),
        ("sm_80", "weight_grad", 48, 300),
        ("sm_90", "weight_grad", 12, 285),
    ],
)
def test_loops_are_tight(arch, primitive, arithmetic, at_most):
    """Instructions beside the matrix instructions of a tile: 128x64x64, and 64x32x64 with three taps."""
    with offline(arch) as gpu:
        Layer(64, 192).run(primitive, torch.float16, device.current().torch_device)
    report = inspect(next(binary for binary in gpu.binaries if binary.kernel in ROWS))
    assert report.arithmetic == arithmetic
    assert report.loop <= at_most


VARIANTS = (
    Layer(64, 192),  # whole vectors in every view
    Layer(24, 50),  # views that start and end inside a vector
    Layer(40, 48, channels_last=False, bias=False),
)
DEPTHWISE_KERNELS = (3, 5, 7)


@contextmanager
def precision(name: str):
    """How float32 convolutions may round their operands."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, name
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def launch_every_matrix_tile(dtype: str) -> None:
    facts, itemsize = device.current(), DTYPES[dtype].itemsize
    for exact in (False, True) if dtype == "fp32" and facts.backend == "cuda" else (dtype == "fp32",):
        with precision("ieee" if exact else "tf32"):
            for tile in tiles.gemm_tiles(itemsize, exact, facts.shared_memory):
                with patch.object(tiles, "gemm_tile", return_value=tile):
                    for layer, primitive in itertools.product(VARIANTS, ("conv", "input_grad")):
                        layer.run(primitive, DTYPES[dtype], facts.torch_device)
            for tile in tiles.weight_tiles(itemsize, exact, facts.shared_memory):
                with patch.object(tiles, "weight_tile", return_value=tile):
                    for layer in VARIANTS:
                        layer.run("weight_grad", DTYPES[dtype], facts.torch_device)


def launch_every_depthwise_tile(dtype: str) -> None:
    where = device.current().torch_device
    for kernel, stride, channels_last in itertools.product(DEPTHWISE_KERNELS, (1, 2), (True, False)):
        layer = Layer(96, 96, kernel, stride, groups=96, channels_last=channels_last)
        shape = kernel**2, channels_last
        for tile in depthwise_plan.all_tiles("conv", *shape):
            with patch.object(depthwise, "conv_tile", return_value=tile):
                layer.run("conv", DTYPES[dtype], where)
                layer.run("input_grad", DTYPES[dtype], where)
        for tile in depthwise_plan.all_tiles("weight_grad", *shape):
            with patch.object(depthwise, "weight_grad_tile", return_value=tile):
                layer.run("weight_grad", DTYPES[dtype], where)


def launch_every_stem_tile(dtype: str) -> None:
    facts, itemsize = device.current(), DTYPES[dtype].itemsize
    for kernel, channels_last in itertools.product((3, 7), (True, False)):
        layer = Layer(3, 64, kernel, stride=2, channels_last=channels_last)
        for primitive in ("conv", "weight_grad"):
            for tile in stem_plan.all_tiles(primitive, itemsize):
                with patch.object(stem, f"{primitive}_tile", return_value=tile):
                    layer.run(primitive, DTYPES[dtype], facts.torch_device)


@pytest.mark.compile_all
@pytest.mark.parametrize("launch", [launch_every_matrix_tile, launch_every_depthwise_tile, launch_every_stem_tile])
@pytest.mark.parametrize(("arch", "dtype"), TARGETS)
def test_every_tile(arch, dtype, launch):
    with offline(arch) as gpu:
        launch(dtype)
    check(gpu)


def training_step(size, dtype="fp16"):
    """Every primitive that a training step of a lifted ResNet-50 calls; images need no gradient."""
    for number, layer in enumerate(resnet50(size)):
        for primitive in PRIMITIVES:
            if number or primitive != "input_grad":
                layer.run(primitive, DTYPES[dtype], device.current().torch_device)


def test_a_training_step_of_a_resnet50_compiles_few_binaries():
    with offline("sm_90") as gpu:
        training_step((64, 64, 64))
        first = {binary.digest for binary in gpu.binaries}
        training_step((96, 80, 112))
        second = {binary.digest: binary for binary in gpu.binaries if binary.digest not in first}
    assert len(first) <= 24
    assert not second, [f"{b.kernel} {tile_text(b)}" for b in second.values()]
