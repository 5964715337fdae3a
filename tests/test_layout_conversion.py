"""The layout conversion without a GPU: what the compiler makes of it, and where it is part of a plan."""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

import acs_triton
from acs_triton.kernels.layout_conversion import convert
from benchmarks.disassembly import resources
from benchmarks.offline import ARCHS, Binary, offline
from benchmarks.workloads import DTYPES, PRIMITIVES, Layer
from tests.test_descriptors import plans

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the compiler")


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One for each way to read, and for each shape of tile."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    last = empty(2, 16, 16, 16, 70).permute(0, 4, 1, 2, 3)
    return {
        "volumes": empty(2, 64, 16, 16, 16),
        "volumes of odd size": empty(2, 64, 7, 7, 7),
        "one channel": empty(1, 1, 16, 16, 16),
        "few channels": empty(2, 12, 16, 16, 16),
        "parts of volumes": empty(2, 64, 16, 16, 20)[..., 2:18],
        "huge volumes": empty(1, 64, 1024, 1024, 64),
        "parts of huge volumes": empty(1, 64, 1024, 1024, 66)[..., 1:65],
        "pairs of channels": last[:, :66],
        "odd channels": last[:, :65],
        "huge rows": empty(1, 1024, 1024, 64, 66).permute(0, 4, 1, 2, 3)[:, :65],
    }


def compiled(arch: str, dtype: str) -> dict[str, Binary]:
    found = {}
    with offline(arch) as gpu:
        for name, tensor in inputs(DTYPES[dtype]).items():
            convert(tensor)
            found[name] = gpu.binaries[-1]
    return found


def moves(binary: Binary) -> dict[str, int]:
    """Loads and stores of global memory, by their bytes a thread."""
    text = binary.files["ptx"].read_text()
    found = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", text)
    return Counter(f"{kind} {int(lanes or 1) * int(bits) // 8}" for kind, lanes, bits in found)


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", "fp16"), ("sm_90", "fp32")])
def test_values_move_in_vectors(arch, dtype):
    """A tile is four vectors a thread: all stores are of 16 bytes, and loads where the tensor's addresses are."""
    binaries, item = compiled(arch, dtype), DTYPES[dtype].itemsize
    for name in ("volumes", "one channel", "few channels", "huge volumes"):
        assert moves(binaries[name]) == {"ld 16": 4, "st 16": 4}, name
    assert moves(binaries["pairs of channels"]) == {f"ld {2 * item}": 32 // item, "st 16": 4}
    for name in ("volumes of odd size", "parts of volumes", "odd channels", "huge rows"):
        assert moves(binaries[name]) == {f"ld {item}": 64 // item, "st 16": 4}, name
    assert not any(resources(binary)[1] for binary in binaries.values())


@pytest.mark.compile_all
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_target_spills(arch, dtype):
    spilled = {name: resources(binary) for name, binary in compiled(arch, dtype).items() if resources(binary)[1]}
    assert not spilled, f"(registers, bytes): {spilled}"


def test_volumes_of_all_sizes_share_binaries():
    with offline("sm_80") as gpu:
        for size in (8, 32, 100):
            for channels in (64, 200):
                convert(torch.empty((2, channels, size, size, size + 8), dtype=torch.float16, device="meta"))
    assert len(gpu.binaries) == 1


LAYER = Layer(60, 96, size=(16, 24, 32), channels_last=False)


def test_plans_say_what_is_converted():
    positions = 2 * 16 * 24 * 32
    with offline("sm_90"):
        of_input, of_gradient = 2 * positions * (60 + 64), 2 * positions * 2 * 96
        assert [plan.copied_bytes for plan in plans(LAYER)] == [of_input, of_gradient, of_input + of_gradient]
        assert [plan.copied_bytes for plan in plans(replace(LAYER, in_channels=64, channels_last=True))] == [0, 0, 0]
        grouped = plans(replace(LAYER, groups=5))[0]  # 12 channels a group in 16
        assert grouped.copied_bytes == 2 * positions * (60 + 80)
        for kept in (Layer(3, 96, channels_last=False), Layer(96, 96, groups=96, channels_last=False)):
            assert plans(kept)[0].copies == (), "read by its strides"


def test_a_1x1_convolution_converts_what_it_reads():
    strided = replace(LAYER, kernel=1, stride=2, size=(32, 32, 32))
    read = 2 * 16**3
    with offline("sm_90"):
        conv, input_grad, weight_grad = plans(strided)
        assert conv.copied_bytes == 2 * read * (60 + 64)
        assert input_grad.copied_bytes == 2 * read * 2 * 96
        assert weight_grad.copied_bytes == conv.copied_bytes + input_grad.copied_bytes
        for size in ((64, 64, 64), (63, 31, 65)):
            last = plans(Layer(64, 192, kernel=1, stride=2, size=size))
            assert [plan.copied_bytes for plan in last] == [0, 0, 0]
            assert [plan.kernel for plan in last] == ["descriptor_gemm", "descriptor_gemm", "descriptor_weight_grad"]


def test_explain_shows_it():
    x = torch.empty((2, 64, 32, 32, 32), dtype=torch.float16, device="meta")
    with offline("sm_80"), acs_triton.use_backend("triton"):
        lines = str(acs_triton.explain(x, x.new_empty((192, 64, 3, 3)), padding=1)).splitlines()
    assert lines[0].endswith("; converts input to channels-last first, which moves 16.8 MB")
    assert lines[2].endswith("; converts grad_output and input to channels-last first, which moves 67.1 MB")
    assert len(lines) == len(PRIMITIVES)
