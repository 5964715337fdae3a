"""Gradients of depthwise layers on CPUs: slices, strips of wide kernels, and every geometry."""

from itertools import product

import pytest
import torch

from acs_triton.arguments import conv_params
from acs_triton.backends import cpu_cost, depthwise, pieces
from acs_triton.backends import torch as torch_backend
from acs_triton.operators import ACSConv

SIZES = (5, 6, 7), (9, 4, 12), (2, 3, 3)


def operands(channels, kernel, size, format=torch.contiguous_format, batch=2, dtype=torch.float32, **options):
    params = conv_params(
        (kernel, kernel),
        channels,
        options.get("stride", 1),
        options.get("padding", 0),
        options.get("dilation", 1),
        channels,
        None,
    )
    geometry = params.geometry(size)
    shapes = (batch, channels, *geometry.output_size), (batch, channels, *size), (channels, 1, kernel, kernel)
    grad, x, weight = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return grad.contiguous(memory_format=format), x.contiguous(memory_format=format), weight, geometry


def check(grad, x, weight, geometry, format=torch.contiguous_format, **tolerances):
    found = depthwise.gradients(grad, x, weight, geometry, format)
    expected = torch_backend.gradients(grad.double(), x.double(), weight.double(), geometry)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted.to(one.dtype), **tolerances)
    assert found[0].is_contiguous(memory_format=format)
    assert found[1].is_contiguous()
    of_input, none = depthwise.gradients(grad, None, weight, geometry, format)
    assert none is None
    torch.testing.assert_close(of_input, found[0], **tolerances)
    none, of_weight = depthwise.gradients(grad, x, None, geometry, format)
    assert none is None
    torch.testing.assert_close(of_weight, found[1], **tolerances)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_numbers_and_formats(kernel, stride, dilation, monkeypatch):
    monkeypatch.setattr(cpu_cost, "_STRIP", 0)
    formats = torch.contiguous_format, torch.channels_last_3d
    checked = 0
    for size, format in product(SIZES, formats):
        for padding in {kernel // 2 * dilation, 0, (kernel - 1) * dilation}:
            if min(size) + 2 * padding <= (kernel - 1) * dilation:
                continue
            options = {"stride": stride, "padding": padding, "dilation": dilation}
            check(*operands(7, kernel, size, format, **options), format, rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked


@pytest.mark.parametrize("size", [(20, 21, 22), (33, 16, 17)])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
def test_large_layers_are_cut(size, format):
    data = operands(54, 5, size, format, batch=1, padding=2)
    assert len(pieces.pieces_of(data[-1], 54, True)) == 6
    check(*data, format, rtol=1e-3, atol=1e-3)


def test_bfloat16():
    data = operands(32, 7, (8, 8, 8), dtype=torch.bfloat16, padding=3)
    if not cpu_cost.plan(data[-1], *data[:2], (True, True)).depthwise:
        pytest.skip("oneDNN has no bfloat16 on this machine")
    check(*data, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "strips"),
    [
        (3, 1, 1, [3]),
        (5, 1, 1, [1, 3, 1]),
        (7, 1, 1, [2, 3, 2]),
        (9, 1, 1, [3, 3, 3]),
        (4, 1, 1, [1, 3]),
        (3, 2, 1, [3]),
        (5, 2, 1, [2, 3]),
        (7, 2, 1, [2, 2, 3]),
        (7, 3, 1, [7]),
        (7, 1, 2, [7]),
    ],
)
def test_strips_of_the_kernel(kernel, stride, dilation, strips, monkeypatch):
    grad, _, weight, geometry = operands(6, kernel, (24, 24, 24), padding=3, stride=stride, dilation=dilation)
    slices = pieces.pieces_of(geometry, 6, True)[0].slices
    widths = [taps.stop - taps.start for taps, _ in slices.strips]
    assert widths == strips
    if widths == [2, 3, 2]:
        assert [fit.exact for _, fit in slices.strips] == [False, True, False]
    for worth, expected in ((0, strips), (1e12, [kernel])):
        monkeypatch.setattr(cpu_cost, "_STRIP", worth)
        chosen = depthwise._strips(slices, slices.of_output(grad[:, :2]), weight[:2])
        assert len(chosen) == len(expected)


def test_layers_take_it_where_onednn_can(monkeypatch):
    seen = []
    original = depthwise.gradients
    monkeypatch.setattr(depthwise, "gradients", lambda *args: seen.append(args) or original(*args))
    x = torch.randn(1, 24, 12, 12, 12, requires_grad=True)
    for options, dtype, taken in (
        ({"groups": 24}, torch.float32, 1),
        ({"groups": 24}, torch.float64, 0),
        ({"groups": 12}, torch.float32, 0),
        ({"groups": 1}, torch.float32, 0),
    ):
        seen.clear()
        layer = ACSConv(24, 24, 3, padding=1, dtype=dtype, **options)
        layer(x.to(dtype)).sum().backward()
        assert len(seen) == taken
    seen.clear()
    ACSConv(24, 48, 3, padding=1, groups=24)(x).sum().backward()
    ACSConv(24, 12, 3, padding=1, groups=12).requires_grad_(False)(x).sum().backward()
    assert not seen
