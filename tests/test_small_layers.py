"""Small layers: plain convolutions, found once, instead of the primitives."""

import gc

import pytest
import torch
from torch import nn

from acs_triton import backends, use_backend
from acs_triton.arguments import conv_params
from acs_triton.backends import small
from acs_triton.functional import acs_conv3d
from acs_triton.layout import memory_format
from acs_triton.operators import ACSConv

CASES = {
    "standard": ((2, 2, 5, 6, 7), (7, 2, 3, 3), {"padding": 1}),
    "stride": ((1, 3, 6, 5, 8), (6, 3, 3, 3), {"padding": 1, "stride": 2}),
    "dilation": ((1, 2, 7, 8, 9), (5, 2, 3, 3), {"padding": 2, "dilation": 2}),
    "pointwise": ((2, 4, 3, 4, 5), (6, 4, 1, 1), {}),
    "one view": ((1, 4, 5, 5, 5), (6, 4, 3, 3), {"padding": 1, "split": (0, 6, 0)}),
    "depthwise": ((1, 6, 5, 4, 6), (6, 1, 3, 3), {"padding": 1, "groups": 6, "split": (6, 0, 0)}),
    "one channel": ((1, 1, 5, 5, 5), (3, 1, 3, 3), {"padding": 1}),
}
OTHERS = {
    "large": ((2, 64, 24, 24, 24), (64, 64, 3, 3), {"padding": 1}),
    "views of some groups each": ((1, 6, 5, 4, 6), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    "cropped views": ((1, 2, 5, 5, 5), (6, 2, 3, 3), {}),
    "input no larger than the kernel": ((1, 2, 3, 5, 5), (6, 2, 3, 3), {"padding": 1}),
    "empty": ((0, 2, 5, 5, 5), (6, 2, 3, 3), {"padding": 1}),
}


def plan(input, weight, stride=1, padding=0, dilation=1, groups=1, split=None):
    params = conv_params(weight.shape[2:], weight.shape[0], stride, padding, dilation, groups, split)
    return backends.small_plan(input, weight, params)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
def test_numbers_and_formats_are_those_of_the_primitives(name, format, monkeypatch):
    input, weight, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (input, weight, weight[:1]))
    x = x.contiguous(memory_format=format)
    w = torch.cat([w, w])[weight[0] :]  # it need not begin where its memory does
    assert plan(x, w, **options) is not None

    def run():
        operands = [one.detach().requires_grad_() for one in (x, w, b)]
        y = acs_conv3d(*operands, **options)
        first = torch.autograd.grad(y.pow(3).sum(), operands, create_graph=True)
        second = torch.autograd.grad(sum(one.pow(2).sum() for one in first), operands)
        with torch.no_grad():
            return y.detach(), acs_conv3d(*operands[:2], None, **options), *first, *second

    found = run()
    assert "ACSConv" not in str(acs_conv3d(x, w.requires_grad_(), b, **options).grad_fn)
    monkeypatch.setattr(backends, "small_plan", lambda *args: None)
    expected = run()
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted)
    assert [one.stride() for one in found[:2]] == [one.stride() for one in expected[:2]]
    assert memory_format(found[0]) == memory_format(x)


@pytest.mark.parametrize("name", OTHERS)
def test_others_take_the_primitives(name):
    input, weight, options = OTHERS[name]
    assert plan(torch.empty(input), torch.empty(weight), **options) is None


def test_dtypes_and_backends():
    input, weight, options = CASES["standard"]
    for dtype in (torch.float16, torch.bfloat16):
        assert plan(torch.empty(input, dtype=dtype), torch.empty(weight, dtype=dtype), **options) is None
    assert plan(torch.empty(input, device="meta"), torch.empty(weight), **options) is None
    with use_backend("triton"):
        assert plan(torch.empty(input), torch.empty(weight), **options) is None
    with use_backend("torch"):
        assert plan(torch.empty(input), torch.empty(weight), **options) is not None


def test_plans_are_made_once():
    input, weight, options = CASES["standard"]
    x, w = torch.randn(input), torch.randn(weight)
    acs_conv3d(x, w, None, **options)
    before = small._plan.cache_info()
    acs_conv3d(x, w, None, **options)
    after = small._plan.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(small, "_kept", kept := {})
    return kept


@torch.no_grad()
def test_parameters_are_cut_once_and_every_change_is_seen(kept):
    layer, x = ACSConv(2, 6, 3, padding=1), torch.randn(1, 2, 4, 4, 4)

    def expected():
        return acs_conv3d(x, layer.weight.detach().clone(), layer.bias.detach().clone(), padding=1)

    torch.testing.assert_close(layer(x), expected())
    (views,) = kept.values()
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.add_(1),
        lambda: layer.bias.data.sub_(1),
        lambda: layer.weight.numpy().__imul__(3),
        lambda: layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()}),
    ):
        change()
        torch.testing.assert_close(layer(x), expected())
        assert [one is views for one in kept.values()] == [True]
    for change in (
        lambda: setattr(layer.weight, "data", torch.randn(6, 2, 3, 3)),
        lambda: setattr(layer.bias, "data", torch.randn(6)),
        lambda: setattr(layer.weight, "data", torch.randn(3, 3, 6, 2).permute(2, 3, 0, 1)),
        lambda: setattr(layer, "acs_kernel_split", (1, 2, 3)),
        lambda: setattr(layer, "bias", None),
    ):
        change()
        bias = None if layer.bias is None else layer.bias.detach().clone()
        split = layer.acs_kernel_split
        wanted = acs_conv3d(x, layer.weight.detach().clone(), bias, padding=1, split=split)
        torch.testing.assert_close(layer(x), wanted)
    layer.double()
    assert layer(x.double()).dtype == torch.float64


def test_what_is_kept_goes_with_the_weight(kept):
    layer, x = ACSConv(2, 6, 3, padding=1), torch.randn(1, 2, 4, 4, 4)
    with torch.inference_mode():
        layer(x)
        acs_conv3d(x, torch.randn(6, 2, 3, 3), padding=1)
    assert len(kept) == 1
    layer(x).sum().backward()  # not by what was kept
    assert layer.weight.grad.abs().sum() > 0
    del layer
    gc.collect()
    assert not kept


def test_nothing_is_kept_of_other_tensors(kept):
    class Other(nn.Parameter):
        pass

    x = torch.randn(1, 2, 4, 4, 4)
    with torch.no_grad():
        acs_conv3d(x, Other(torch.randn(6, 2, 3, 3)), padding=1)
    assert not kept


def test_activations_follow_them(monkeypatch):
    x, w = torch.randn(1, 2, 4, 4, 4), torch.randn(6, 2, 3, 3)
    expected = acs_conv3d(x, w, padding=1).relu()
    monkeypatch.setattr(backends.torch_backend, "conv", None)  # which computes all other layers
    for weight in (w, w.clone().requires_grad_()):
        torch.testing.assert_close(acs_conv3d(x, weight, padding=1, activation="relu"), expected)
