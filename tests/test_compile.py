"""Every kernel compiles for every target, without a GPU: tiles fit, nothing spills, the right instructions are used.

``pytest`` compiles what the usual layers launch for a part of the targets and dtypes;
``pytest -m compile_all`` every tile that can be chosen, for all of them. That takes an hour of CPU time;
what one run has compiled, Triton's cache keeps for the next, so a run that was cut off goes on where it
stopped. ``-k sm_90`` or ``-k "fp16 and matrix"`` run a part.
"""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

triton = pytest.importorskip("triton")

from acs_triton.activations import ACTIVATIONS
from acs_triton.kernels import (
    depthwise,
    depthwise_plan,
    descriptor_gemm,
    descriptor_tables,
    descriptor_weight_grad,
    descriptors,
    device,
    gather_gemm,
    split_depth,
    stem,
    stem_plan,
    tiles,
    weight_grad,
)
from benchmarks.disassembly import inspect, resources
from benchmarks.kernel_report import tile_text
from benchmarks.offline import ARCHS, Binary, OfflineDriver, offline
from benchmarks.workloads import DTYPES, PRIMITIVES, TYPICAL, Layer, resnet50

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the compiler")

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

MATRIX = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "MFMA",
}
ROWS = {
    "gather_gemm_kernel": "BM",
    "descriptor_gemm_kernel": "BO",
    "weight_grad_kernel": "BC",
    "descriptor_weight_grad_kernel": "BC",
}
"""The matrix kernels, and which of their constants is the number of rows of a tile."""

TARGETS = list(itertools.product(ARCHS, DTYPES))


def matrix_instruction(binary: Binary) -> str:
    """What the target multiplies a tile with; wgmma and tcgen05 need at least 64 rows."""
    small = binary.constants[ROWS[binary.kernel]] < 64
    return "HMMA" if small and binary.arch in ("sm_90", "sm_100") else MATRIX[binary.arch]


def faults(binary: Binary) -> list[str]:
    """What is wrong with a compiled kernel, in words; shared memory was checked when it was launched."""
    registers, spilled = resources(binary)
    found = [f"spills {spilled} bytes ({registers} registers)"] if spilled else []
    report = inspect(binary) if binary.kernel in ROWS else None
    if binary.kernel in ROWS and binary.constants["PRECISION"] == "ieee" and binary.signature.get("p_x") == "*fp32":
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


@pytest.mark.parametrize(("arch", "dtype", "activation"), [("sm_80", "fp16", "gelu"), ("sm_90", "bf16", "silu")])
def test_activations(arch, dtype, activation):
    with offline(arch) as gpu:
        for layer in (TYPICAL[0], *TYPICAL[-3::2]):
            replace(layer, activation=activation).run("conv", DTYPES[dtype], device.current().torch_device)
    activations = (binary.constants["ACTIVATION"] for binary in gpu.binaries if binary.kernel != "pack_kernel")
    assert set(activations) == {activation}
    check(gpu)


@pytest.mark.parametrize(
    ("layer", "narrow", "at_most"),
    [
        (Layer(64, 192), "st.global.b16", 0),
        (Layer(96, 96, groups=96), "ld.global.b16", 4),  # a thread's bias
    ],
)
def test_values_move_in_vectors(layer, narrow, at_most):
    with offline("sm_80") as gpu:
        layer.run("conv", torch.float16, device.current().torch_device)
    *_, binary = gpu.binaries
    assert binary.files["ptx"].read_text().count(narrow) <= at_most


@pytest.mark.parametrize("primitive", ["conv", "input_grad"])
def test_packed_weights_are_stored_in_vectors(primitive):
    with offline("sm_80") as gpu:
        Layer(64, 192).run(primitive, torch.float16, device.current().torch_device)
    (text,) = (one.files["ptx"].read_text() for one in gpu.binaries if one.kernel == "pack_kernel")
    assert text.count("st.global.v4.b32") > 0
    assert text.count("st.global.b16") == 0


of_this_compiler = pytest.mark.skipif(
    TRITON < (3, 6), reason="the figures are those of Triton 3.6 and newer; older ones make longer loops"
)


@of_this_compiler
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
    with offline(arch) as gpu, without_descriptors():
        Layer(64, 192).run(primitive, torch.float16, device.current().torch_device)
    report = inspect(next(binary for binary in gpu.binaries if binary.kernel in ROWS))
    assert report.arithmetic == arithmetic
    assert report.loop <= at_most


@of_this_compiler
@pytest.mark.parametrize(("arch", "at_most"), [("sm_90", 104), ("sm_100", 118)])
@pytest.mark.parametrize(
    ("layer", "primitive", "more"),
    [
        (Layer(64, 192), "conv", 0),
        (Layer(64, 64), "conv", 0),
        (Layer(64, 192), "input_grad", 0),
        (Layer(64, 192, stride=2), "conv", 16),
    ],
)
def test_loops_with_descriptors_are_tight(arch, at_most, layer, primitive, more):
    """A tile of 64x256x64: two copies of boxes and no other load, four matrix instructions, no address in between.

    At a stride, finding a box's class takes a few instructions more.
    """
    with offline(arch) as gpu:
        layer.run(primitive, torch.float16, device.current().torch_device)
    (binary,) = (binary for binary in gpu.binaries if binary.kernel in ROWS)
    assert binary.kernel == "descriptor_gemm_kernel"
    assert binary.num_warps == 4
    report = inspect(binary)
    assert report.copies == {"tma": 2}
    assert report.arithmetic == 4
    assert report.loop <= at_most + more + 4 * (arch == "sm_100" and TRITON < (3, 7))
    assert report.spilled == 0


@of_this_compiler
def test_the_weight_gradients_loop_with_descriptors_is_tight():
    """A tile of 64x64 channels and a row of 64 positions, three taps: both operands from shared memory."""
    with offline("sm_90") as gpu:
        Layer(64, 192, size=(32, 32, 64)).run("weight_grad", torch.float16, device.current().torch_device)
    (binary,) = (binary for binary in gpu.binaries if binary.kernel in ROWS)
    report = inspect(binary)
    assert (binary.kernel, report.matrix, report.arithmetic) == ("descriptor_weight_grad_kernel", "HGMMA", 12)
    assert report.copies == {"tma": 4}
    assert report.loop <= 190
    assert report.spilled == 0


VARIANTS = (
    Layer(64, 192),  # whole vectors in every view
    Layer(24, 50),  # views that start and end inside a vector
    Layer(40, 48, channels_last=False),
    Layer(64, 64, soft=True),  # merged taps
)


@contextmanager
def without_descriptors():
    """Send what descriptor kernels would compute to the other ones."""
    with (
        patch.object(descriptor_gemm, "suits", return_value=False),
        patch.object(descriptor_weight_grad, "suits", return_value=False),
    ):
        yield


@contextmanager
def always(kernel, rule: str, tile):
    """Have a rule of ``tiles`` answer with one tile, and a kernel ask it anew for every layer."""
    with patch.object(tiles, rule, return_value=tile), patch.object(kernel, "_choose", kernel._choose.__wrapped__):
        yield


HUGE = (2048, 1024, 1024)
"""A volume of one sample that needs 64-bit offsets."""


@contextmanager
def precision(name: str):
    """How float32 convolutions may round their operands."""
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, name
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def precisions(dtype: str) -> tuple[str, ...]:
    """Settings of :func:`precision` that make a difference."""
    return ("tf32", "ieee") if dtype == "fp32" and device.current().backend == "cuda" else ("tf32",)


def launch_every_matrix_tile(dtype: str) -> None:
    facts, to = device.current(), DTYPES[dtype]
    for setting in precisions(dtype):
        with precision(setting):
            limits = to.itemsize, device.exact(to), facts.shared_memory
            for tile in tiles.gemm_tiles(*limits):
                with always(gather_gemm, "gemm_tile", tile), without_descriptors():
                    for layer, primitive in itertools.product(VARIANTS, ("conv", "input_grad")):
                        layer.run(primitive, to, facts.torch_device)
            for tile in tiles.weight_tiles(*limits):
                with always(weight_grad, "weight_tile", tile), without_descriptors():
                    for layer in VARIANTS:
                        layer.run("weight_grad", to, facts.torch_device)


def launch_every_descriptor_tile(dtype: str) -> None:
    facts, to = device.current(), DTYPES[dtype]
    if not descriptors.available():
        pytest.skip(f"{facts.arch} has no copy engine")
    for tile in descriptor_tables.all_tiles(to.itemsize, facts.shared_memory):
        strided = tuple(replace(layer, stride=2) for layer in VARIANTS)
        for layer, primitive in itertools.product(VARIANTS + strided, ("conv", "input_grad")):
            with patch.object(descriptor_gemm, f"{primitive}_tile", return_value=tile):
                layer.run(primitive, to, facts.torch_device)
    for tile in descriptor_weight_grad.all_tiles(facts.shared_memory) if to.itemsize == 2 else ():
        with patch.object(descriptor_weight_grad, "weight_grad_tile", return_value=tile):
            for stride in (1, 2):
                kernel = 2 if tile.taps == 1 else 3  # a 1x1 kernel's stride is a view's
                replace(VARIANTS[0], kernel=kernel, stride=stride).run("weight_grad", to, facts.torch_device)


def launch_every_depthwise_tile(dtype: str) -> None:
    """3x3, 5x5 and 7x7 kernels at strides 1 and 2, with and without whole vectors of channels."""
    # Two positions along an axis are fewer than a box has rows: another tile, or rows that share nothing.
    for kernel, stride, size in itertools.product((3, 5, 7), (1, 2), ((32, 32, 32), (2, 32, 32))):
        for channels, channels_last in ((96, True), (90, True), (96, False)):
            layer = Layer(channels, channels, kernel, stride, channels, size, channels_last=channels_last)
            for primitive in PRIMITIVES:
                layer.run(primitive, DTYPES[dtype], device.current().torch_device)


def launch_every_stem_tile(dtype: str) -> None:
    for setting, columns, channels_last in itertools.product(precisions(dtype), (16, 32), (True, False)):
        with precision(setting):
            layer = Layer(3, 3 * columns, 7, stride=2, channels_last=channels_last)
            for primitive in ("conv", "weight_grad"):
                layer.run(primitive, DTYPES[dtype], device.current().torch_device)


def launch_activations(dtype: str) -> None:
    for layer, activation in itertools.product(TYPICAL, ACTIVATIONS):
        # GELU's erf spills up to 248 bytes at the end of the descriptor kernel, outside its loop.
        dense = layer.groups < layer.in_channels and layer.in_channels > 3
        if not (activation == "gelu" and dense and device.current().arch in (90, 100, 120)):
            replace(layer, activation=activation).run("conv", DTYPES[dtype], device.current().torch_device)


def launch_sums_of_splits(dtype: str) -> None:
    for y_unit, activation in itertools.product((16 // DTYPES[dtype].itemsize, 1, 0), ("", *ACTIVATIONS)):
        y = torch.empty((2, 64, 4, 4, 4), dtype=DTYPES[dtype], device=device.current().torch_device)
        places = torch.empty(64, dtype=torch.int32, device=y.device)
        split_depth.finish(split_depth.sums(y, 3, 64), places, y.new_empty(64), y, y_unit, activation)


def launch_huge_samples(dtype: str) -> None:
    for channels_last in (True, False):
        for layer in (
            Layer(96, 96, 5, groups=96, size=HUGE, batch=1, channels_last=channels_last),
            Layer(3, 96, 7, stride=2, size=HUGE, batch=1, channels_last=channels_last),
        ):
            for primitive in ("conv", "weight_grad"):
                layer.run(primitive, DTYPES[dtype], device.current().torch_device)


LAUNCHES = {
    "matrix": launch_every_matrix_tile,
    "descriptor": launch_every_descriptor_tile,
    "depthwise": launch_every_depthwise_tile,
    "stem": launch_every_stem_tile,
    "activations": launch_activations,
    "splits": launch_sums_of_splits,
    "huge": launch_huge_samples,
}


@pytest.mark.compile_all
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(("arch", "dtype"), TARGETS)
def test_every_tile(arch, dtype, launch):
    with offline(arch) as gpu:
        LAUNCHES[launch](dtype)
    check(gpu)


@pytest.mark.parametrize("kernel", ["conv", "weight_grad"])
@pytest.mark.parametrize("family", ["depthwise", "stem"])
def test_the_launches_above_choose_every_tile(family, kernel):
    module, name, found = {"depthwise": depthwise, "stem": stem}[family], f"{kernel}_tile", set()
    choose = getattr(module, name)

    def record(*facts):
        found.add(choose(*facts))
        return choose(*facts)

    with offline("sm_80"), patch.object(triton.runtime.JITFunction, "run"), patch.object(module, name, record):
        LAUNCHES[family]("fp16")
    if family == "stem":
        assert found == set(stem_plan.all_tiles(kernel, 2))
    else:
        shapes = itertools.product((9, 25, 49), (True, False), (1, 2))
        assert found == {tile for shape in shapes for tile in depthwise_plan.all_tiles(kernel, *shape)}


def training_step(size, batch=2, dtype="fp16"):
    """Every primitive that a training step of a lifted ResNet-50 calls; images need no gradient."""
    for number, layer in enumerate(resnet50(size, batch)):
        for primitive in PRIMITIVES:
            if number or primitive != "input_grad":
                layer.run(primitive, DTYPES[dtype], device.current().torch_device)


def test_a_training_step_of_a_resnet50_compiles_few_binaries():
    """Two volumes together: sizes are no constants, and channels decide on the tiles."""
    with offline("sm_90") as gpu:
        training_step((64, 64, 64))
        training_step((96, 80, 112))
    assert len({binary.digest for binary in gpu.binaries}) <= 24


def binaries(size, batch):
    """What a training step would compile, without compiling: kernels with their constants and options."""
    found = set()

    def record(kernel, *arguments, grid, warmup, **constants):
        found.add((kernel.fn.__name__, *sorted((name, str(value)) for name, value in constants.items())))

    with patch.object(triton.runtime.JITFunction, "run", record):
        training_step(size, batch)
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_second_volume_size_adds_no_binary(arch):
    """From 32**3 to 224**3 voxels, but for the kernel that adds up split sums where the first size has none.

    Where a layer at stride 2 gets an odd size, it takes the pointer kernels instead of descriptors.
    """
    volumes = [((size,) * 3, batch) for size in (32, 64, 96, 128, 160, 224) for batch in (1, 2, 8)]
    volumes += [((32, 64, 64), 1), ((192, 224, 160), 4)]
    odd = [((24, 48, 48), 1), ((192, 224, 176), 4), ((72, 144, 208), 2)]
    with offline(arch):
        steps, others = ([binaries(*volume) for volume in some] for some in (volumes, odd))
    every = set().union(*steps)
    assert len(every) <= 20
    for volume, step in zip(volumes, steps, strict=True):
        assert {kernel for kernel, *_ in every - step} <= {"finish_kernel"}, volume
    added = set().union(*others) - every
    assert len(added) <= (3 if arch == "sm_90" else 0)
    assert {kernel for kernel, *_ in added} <= {"gather_gemm_kernel", "weight_grad_kernel"}


def test_a_tile_is_chosen_once_for_each_shape_and_setting():
    def choose(dtype):
        shape, to = (64, 192), DTYPES[dtype]
        geometry = Layer(*shape, size=(12, 11, 10)).geometry
        gemms = (choose(*shape, to, geometry) for choose in (gather_gemm.conv_tile, gather_gemm.input_grad_tile))
        return *gemms, weight_grad.weight_grad_tile(*shape, to, geometry)

    with offline("sm_80"):
        first = {dtype: choose(dtype) for dtype in DTYPES}
        with precision("ieee"):
            exact = choose("fp32")
        with patch.object(tiles, "gemm_tile", side_effect=AssertionError), patch.object(tiles, "weight_tile", None):
            assert {dtype: choose(dtype) for dtype in DTYPES} == first
            with precision("ieee"):
                assert choose("fp32") == exact
    assert not set(exact) & set(first["fp32"])
    with offline("gfx942"):
        assert choose("fp16") != first["fp16"]
