"""Infinite and NaN values reach what is connected to them and nothing else while the origin of a NaN is looked for."""

import math

import pytest
import torch

from acs_triton import explain, use_backend
from acs_triton.backends import triton as backend

from . import oracle
from .cases import LAYOUTS, Case

CASES = {
    "views": Case(8, 12, (2, 3, 3), batch=1),
    "strided": Case(8, 6, (3, 3, 2), stride=(2, 2, 2), batch=1),
    "groups of no whole vectors": Case(6, 6, (2, 3, 2), groups=2, batch=1),
    "mixed views in groups": Case(6, 4, (2, 2, 3), groups=2, split=(), batch=1),
    "stem": Case(2, 7, (3, 3, 3), batch=1, layout="ncdhw"),
    "depthwise": Case(6, 6, (2, 3, 3), groups=6, batch=1),
}


@pytest.fixture
def exactly():
    with torch.autograd.detect_anomaly(check_nan=False):
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CASES)
def test_they_reach_what_is_connected(name, make, device, main_dtype, exactly):
    case = CASES[name]
    geometry, format = case.geometry, LAYOUTS[case.layout]
    x, g = make(case.input_shape, main_dtype, 1, format), make(case.output_shape, main_dtype, 2, format)
    w = make(case.weight_shape, main_dtype, 3)
    ones = [torch.ones(one.shape, dtype=torch.float64) for one in (x, w, g)]
    hit, at = x.clone(memory_format=torch.preserve_format), (0, -1, *(n // 2 for n in case.size))
    hit[at], one = math.inf, torch.zeros_like(ones[0])
    one[at] = 1
    y = backend.conv(hit, w, None, geometry).cpu()
    assert torch.equal(~y.isfinite(), oracle.conv(one, ones[1], None, geometry) != 0)
    for_weight = backend.weight_grad(g, hit, geometry).cpu()
    assert torch.equal(~for_weight.isfinite(), oracle.weight_grad(ones[2], one, geometry) != 0)
    channel = case.out_channels // 2
    hit, at = g.clone(memory_format=torch.preserve_format), (0, channel, *(n // 2 for n in geometry.output_size))
    hit[at], one = math.nan, torch.zeros_like(ones[2])
    one[at] = 1
    for_input = backend.input_grad(hit, w, geometry).cpu()
    assert torch.equal(~for_input.isfinite(), oracle.input_grad(one, ones[1], geometry) != 0)
    for_weight = backend.weight_grad(hit, x, geometry).cpu()
    assert for_weight.isfinite().flatten(1).all(1).tolist() == [o != channel for o in range(case.out_channels)]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_explained(device):
    x, w = (torch.zeros(shape, device=device.torch_device) for shape in ((1, 8, 3, 3, 3), (12, 8, 3, 3)))
    with use_backend("triton"):
        assert "part by part" not in explain(x, w, padding=1)
        with torch.autograd.detect_anomaly(check_nan=False):
            assert explain(x, w, padding=1).count("part by part") == 3
            assert "merged=True" not in explain(x, w, padding=1)
