"""On CPUs infinite and NaN values reach what is connected to them and nothing else, in gradients too."""

import math

import pytest
import torch
from kernels import oracle

from acs_triton.backends import cpu_cost, torch_backend
from benchmarks.workloads import Layer

LAYERS = {
    "volume": Layer(8, 12, size=(5, 6, 7), batch=1),
    "strided": Layer(8, 12, stride=2, size=(5, 6, 7), batch=1),
    "groups": Layer(6, 15, groups=3, size=(5, 6, 7), batch=1),
    "depthwise": Layer(6, 6, groups=6, size=(5, 6, 7), batch=1),
    "by taps": Layer(256, 240, size=(2, 5, 8), batch=1),
    "by columns, but for anomaly detection": Layer(256, 240, size=(2, 3, 4), batch=1),
}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_they_reach_what_is_connected(name, format):
    layer = LAYERS[name]
    geometry = layer.geometry
    x = torch.randn(1, layer.in_channels, *layer.size).contiguous(memory_format=format)
    g = torch.randn(1, layer.out_channels, *geometry.output_size).contiguous(memory_format=format)
    w = torch.randn(layer.out_channels, layer.in_channels // layer.groups, 3, 3)
    assert cpu_cost.plan(geometry, g, x, (True, True)).by_taps == name.startswith("by ")
    at = 0, 1, *(n // 2 for n in layer.size)
    one = torch.zeros_like(x)
    x[at], one[at] = math.inf, 1
    y = torch_backend.conv(x, w, None, geometry)
    assert torch.equal(~y.isfinite(), oracle.conv(one, torch.ones_like(w), None, geometry) != 0)
    for_weight = torch_backend.gradients(g, x, w, geometry)[1]
    assert torch.equal(~for_weight.isfinite(), oracle.weight_grad(torch.ones_like(g), one, geometry) != 0)
    at = 0, 1, *(n // 2 for n in geometry.output_size)
    one = torch.zeros_like(g)
    g[at], one[at] = math.nan, 1
    for_input = torch_backend.gradients(g, torch.ones_like(x), w, geometry)[0]
    assert torch.equal(~for_input.isfinite(), oracle.input_grad(one, torch.ones_like(w), geometry) != 0)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_columns_are_not_for_anomaly_detection():
    """A NaN at a corner of the output's gradient makes the weight's NaN at the taps that read there alone."""
    layer = LAYERS["by columns, but for anomaly detection"]
    geometry = layer.geometry
    x, g = torch.ones(1, layer.in_channels, *layer.size), torch.ones(1, layer.out_channels, *geometry.output_size)
    w, one = torch.ones(layer.out_channels, layer.in_channels, 3, 3), torch.zeros_like(g)
    g[0, 1, 0, 0, 0], one[0, 1, 0, 0, 0] = math.nan, 1
    assert cpu_cost.plan(geometry, g, x, (True, True)).by_columns
    with torch.autograd.detect_anomaly(check_nan=False):
        assert not cpu_cost.plan(geometry, g, x, (True, True)).by_columns
        for_weight = torch_backend.gradients(g, x, w, geometry)[1]
    assert torch.equal(~for_weight.isfinite(), oracle.weight_grad(one, torch.ones_like(x), geometry) != 0)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_strips_are_not_for_anomaly_detection(monkeypatch):
    monkeypatch.setattr(cpu_cost, "_STRIP", 0)
    layer = Layer(6, 6, kernel=5, groups=6, size=(8, 7, 9), batch=1)
    geometry = layer.geometry
    x, g, w = torch.ones(1, 6, *layer.size), torch.ones(1, 6, *geometry.output_size), torch.ones(6, 1, 5, 5)
    one = torch.zeros_like(g)
    g[0, 1, 0, 0, 0], one[0, 1, 0, 0, 0] = math.nan, 1
    expected = oracle.weight_grad(one, torch.ones_like(x), geometry) != 0
    assert not torch.equal(~torch_backend.gradients(g, x, w, geometry)[1].isfinite(), expected)
    with torch.autograd.detect_anomaly(check_nan=False):
        for_weight = torch_backend.gradients(g, x, w, geometry)[1]
    assert torch.equal(~for_weight.isfinite(), expected)
