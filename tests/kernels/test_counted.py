"""The roofline report's counts against what the compiled kernels execute on an emulated GPU."""

import dataclasses

import pytest
import torch

from acs_triton.backends import triton as triton_backend
from benchmarks.roofline.counts import count
from benchmarks.roofline.launches import Launch, record

from .cases import LAYOUTS, Case

PRIMITIVES = ("conv", "input_grad", "weight_grad")
ALLOWED = 0.02

CASES = {
    "dense": Case(64, 64, (8, 8, 16), batch=1),
    "dense, ragged": Case(24, 40, (7, 6, 5)),
    "dense, wide": Case(128, 128, (4, 8, 8), batch=1),
    "strided": Case(64, 128, (8, 9, 8), stride=(2, 2, 2)),
    "grouped": Case(64, 64, (6, 7, 8), groups=2),
    "1x1": Case(64, 256, (8, 8, 8), kernel=(1, 1), padding=(0, 0)),
    "1x1, strided": Case(64, 128, (8, 8, 8), kernel=(1, 1), padding=(0, 0), stride=(2, 2, 2)),
    "deep": Case(256, 256, (3, 4, 4), batch=1),
    "deep, ragged": Case(96, 50, (3, 4, 5)),
    "strided, even": Case(64, 192, (8, 8, 12), stride=(2, 2, 2)),
    "strided along some axes": Case(72, 64, (6, 8, 8), stride=(1, 2, 2), batch=1),
    "deep, strided": Case(256, 128, (4, 4, 4), stride=(2, 2, 2), batch=1),
    "deep, channels not last": Case(256, 64, (3, 4, 4), batch=1, layout="ncdhw"),
    "channels not last": Case(64, 70, (5, 6, 7), batch=1, layout="ncdhw"),
    "channels not last, grouped": Case(72, 40, (6, 8, 10), groups=2, layout="ncdhw"),
    "channels of no whole vectors": Case(20, 26, (5, 6, 7)),
    "depthwise": Case(96, 96, (8, 8, 16), groups=96, batch=1),
    "depthwise, ragged": Case(40, 40, (7, 8, 9), groups=40),
    "depthwise, strided": Case(
        48, 48, (10, 11, 12), kernel=(5, 5), padding=(2, 2), stride=(2, 2, 2), groups=48, batch=1
    ),
    "depthwise, odd": Case(33, 33, (5, 6, 7), groups=33, batch=1),
    "stem": Case(3, 64, (16, 16, 32), kernel=(7, 7), padding=(3, 3), stride=(2, 2, 2), batch=1),
    "stem, ragged": Case(3, 20, (9, 11, 13), kernel=(5, 5), padding=(2, 2), stride=(2, 2, 2)),
    "stem, channels not last": Case(1, 16, (8, 8, 8), layout="ncdhw", batch=1),
}


@pytest.fixture
def counters(device, monkeypatch):
    """The emulator's log of launches, with counters in it; fused multiply-adds are counted by themselves."""
    if device.interpreted or device.hardware:
        pytest.skip("needs the emulated GPU")
    emulated_gpu, ptx_profile = pytest.importorskip("emulated_gpu"), pytest.importorskip("ptx_profile")
    classify = ptx_profile.classify
    monkeypatch.setattr(ptx_profile, "classify", lambda i: "fma" if i.op == "fma" and "f32" in i.mods else classify(i))
    monkeypatch.setitem(emulated_gpu.OPT, "profile", True)
    return emulated_gpu.LOG


def executed(counts) -> dict[str, int]:
    """An emulated launch's counters in the report's terms."""
    stored = 32 * counts["glob"].get("store", {"sectors": 0})["sectors"]
    return {
        "matrix": sum(counts["macs"].values()),
        "scalar": 32 * counts["issued"].get("fma", 0),
        "loaded": 32 * counts["l2_sectors_min"] - stored,
        "stored": stored,
        "read": counts["read_bytes"],
        "written": counts["write_bytes"],
    }


@pytest.mark.parametrize("primitive", PRIMITIVES)
@pytest.mark.parametrize("name", CASES)
def test_counts_are_what_is_executed(name, primitive, make, counters):
    case = CASES[name]
    x, grad = (make(shape, torch.float16, 0, LAYOUTS[case.layout]) for shape in (case.input_shape, case.output_shape))
    weight, bias = make(case.weight_shape, torch.float16, 1), make((case.out_channels,), torch.float16, 2)

    def call():
        if primitive == "conv":
            triton_backend.conv(x, weight, bias, case.geometry)
        elif primitive == "input_grad":
            triton_backend.input_grad(grad, weight, case.geometry)
        else:
            triton_backend.weight_grad(grad, x, case.geometry)

    launches = [event for event in record(call) if isinstance(event, Launch)]
    first = len(counters)
    call()
    made = counters[first:]
    assert [launch.kernel for launch in launches] == [kernel for kernel, *_ in made]
    for launch, (kernel, grid, _, counts) in zip(launches, made, strict=True):
        assert launch.programs == grid[0] * grid[1] * grid[2]
        work, real = dataclasses.asdict(count(launch)), executed(counts)
        if work["matrix"] or kernel.endswith(("_splits_kernel", "_partials_kernel", "finish_kernel")):
            del real["scalar"]  # a few, beside the matrix instructions: no part of the count
        off = {
            field: (work[field], value) for field, value in real.items() if abs(work[field] - value) > ALLOWED * value
        }
        assert not off, f"{kernel}: (counted, executed) {off}"


def test_the_emulated_report(device, counters, monkeypatch, capsys):
    """The depthwise layer is limited by DRAM, as counted, and by nothing that only running programs tells."""
    import emulated_gpu

    from benchmarks.roofline import emulated

    def install(arch, profile, sample):
        assert (arch, profile) == (device.arch, True)
        monkeypatch.setitem(emulated_gpu.OPT, "sample", sample)

    monkeypatch.setattr(emulated_gpu, "install", install)
    emulated.main(["--gpu", {80: "a100", 90: "h100"}[device.arch], "--layers", "dw", "--programs", "2"])
    forward = next(line for line in capsys.readouterr().out.splitlines() if " conv " in line)
    _, fma, l2, dram, issue, shared, bound, ratio = map(float, forward.split("conv")[1].split())
    assert 0 < max(fma, l2, issue) < dram == bound
    assert shared == 0
    assert ratio == pytest.approx(1, abs=0.02)
