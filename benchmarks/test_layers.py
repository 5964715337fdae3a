"""Layers: ours, the published operator, the reference eager and compiled, and nn.Conv3d.

On a GPU ``extra_info`` holds the device's own time (CUDA events, L2 flushed between calls), and
pytest-benchmark's table the time with the call's overhead.
"""

from __future__ import annotations

import pytest
import torch

from .layers import IMPLEMENTATIONS, LAYERS, LAYOUTS, build
from .measure import inference, limits, synchronise, training_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32} | ({"fp16": torch.float16, "bf16": torch.bfloat16} if DEVICE == "cuda" else {})
STEPS = {"train": training_step, "infer": inference}


@pytest.fixture(scope="module", autouse=True)
def fast_cudnn():
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(scope="module")
def limit(dtype):
    return limits(DEVICE, dtype)


@pytest.mark.parametrize("phase", STEPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.slug)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer(benchmark, implementation, case, layout, phase, dtype, limit):
    benchmark.group = f"{case.name} {layout} {phase}"
    to = {"device": DEVICE, "dtype": dtype}
    model, x = build(implementation, case).to(**to), case.input(LAYOUTS[layout], **to)
    step = STEPS[phase](model, x)

    def run():
        step()
        synchronise(DEVICE)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    if DEVICE == "cuda":
        from triton.testing import do_bench

        seconds = do_bench(step, return_mode="median") * 1e-3
    passes = (2 if case.is_stem else 3) if phase == "train" else 1
    moved = x.element_size() * (x.numel() + step().numel()) * passes
    benchmark.extra_info |= {
        "layer": case.name,
        "layout": layout,
        "phase": phase,
        "implementation": implementation,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "median_ms": seconds * 1e3,
        "gflops": 2 * case.multiply_adds(passes) / seconds * 1e-9,
        "gbytes_per_s": moved / seconds * 1e-9,
        "peak_gflops": 2 * limit.multiply_adds * 1e-9,
        "copy_gbytes_per_s": limit.copied_bytes * 1e-9,
    }
