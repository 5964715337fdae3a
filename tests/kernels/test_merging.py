"""The choice between merged taps and views, against what both execute on an emulated GPU."""

import pytest
import torch

from acs_triton.kernels import gather_gemm

from .cases import Case

GPUS = {80: "A100", 90: "H100"}
ALLOWED = 1.1
"""Bound of the choice as a multiple of the other's."""


@pytest.fixture
def bound(device, monkeypatch):
    """``bound(call)``: least time of the busiest resource, in seconds, from the counters of a part of the programs."""
    if device.interpreted or device.hardware:
        pytest.skip("needs the emulated GPU")
    emulated_gpu, ptx_profile = pytest.importorskip("emulated_gpu"), pytest.importorskip("ptx_profile")
    monkeypatch.setitem(emulated_gpu.OPT, "profile", True)
    monkeypatch.setitem(emulated_gpu.OPT, "sample", 8)

    def bound(call):
        call()
        seconds, busiest = ptx_profile.bound(emulated_gpu.LOG[-1][3], GPUS[device.arch])
        return seconds[busiest]

    return bound


@pytest.mark.parametrize("primitive", ["conv", "input_grad"])
@pytest.mark.parametrize("channels", [16, 32, 48, 64, 128])
def test_the_choice_has_the_lower_bound(channels, primitive, make, device, bound, monkeypatch):
    case = Case(channels, channels, (16, 32, 32))
    x, w = make(case.input_shape, torch.float16, 1, torch.channels_last_3d), make(case.weight_shape, torch.float16, 2)

    def call():
        return (
            gather_gemm.conv(x, w, None, case.geometry)
            if primitive == "conv"
            else gather_gemm.input_grad(x, w, case.geometry)
        )

    chosen = getattr(gather_gemm, f"{primitive}_tile")(channels, channels, torch.float16, case.geometry).merged
    bounds = {}
    for merged in (False, True):
        monkeypatch.setattr(gather_gemm, "merging", lambda *args, merged=merged, **kwargs: (merged,))
        bounds[merged] = bound(call)
    assert bounds[chosen] <= ALLOWED * bounds[not chosen]
