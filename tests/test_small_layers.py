"""Small layers: the torch backend's shorter way to the numbers of the general one."""

import pytest
import torch

from acs_triton.arguments import conv_params
from acs_triton.backends import small
from acs_triton.backends import torch as torch_backend
from acs_triton.layout import memory_format

CASES = {
    "standard": ((2, 2, 5, 6, 7), (7, 2, 3, 3), {"padding": 1}),
    "stride": ((1, 3, 6, 5, 8), (6, 3, 3, 3), {"padding": 1, "stride": 2}),
    "dilation": ((1, 2, 7, 8, 9), (5, 2, 3, 3), {"padding": 2, "dilation": 2}),
    "pointwise": ((2, 4, 3, 4, 5), (6, 4, 1, 1), {}),
    "one view": ((1, 4, 5, 5, 5), (6, 4, 3, 3), {"padding": 1, "split": (0, 6, 0)}),
    "depthwise": ((1, 6, 5, 4, 6), (6, 1, 3, 3), {"padding": 1, "groups": 6, "split": (6, 0, 0)}),
}
OTHERS = {
    "large": ((2, 64, 24, 24, 24), (64, 64, 3, 3), {"padding": 1}),
    "views of some groups each": ((1, 6, 5, 4, 6), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    "cropped views": ((1, 2, 5, 5, 5), (6, 2, 3, 3), {}),
    "input no larger than the kernel": ((1, 2, 3, 5, 5), (6, 2, 3, 3), {"padding": 1}),
    "empty": ((0, 2, 5, 5, 5), (6, 2, 3, 3), {"padding": 1}),
}


def resolved(input, weight, stride=1, padding=0, dilation=1, groups=1, split=None):
    params = conv_params(weight[2:], weight[0], stride, padding, dilation, groups, split)
    return params.geometry(input[2:])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
def test_numbers_and_formats_are_those_of_the_general_way(name, format, monkeypatch):
    input, weight, options = CASES[name]
    geometry = resolved(input, weight, **options)
    assert small.plan(geometry, input, weight, True) is not None
    generator = torch.Generator().manual_seed(0)
    x, w, b, g = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (input, weight, weight[:1], (input[0], weight[0], *geometry.output_size))
    )
    x, g = (one.contiguous(memory_format=format) for one in (x, g))
    w = torch.cat([w, w])[weight[0] :]  # it need not begin where its memory does

    def run():
        return (
            torch_backend.conv(x, w, b, geometry),
            torch_backend.conv(x, w, None, geometry),
            *torch_backend.gradients(g, x, w, geometry),
        )

    found = run()
    monkeypatch.setattr(small, "plan", lambda *shapes: None)
    for one, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(one, expected)
        assert one.stride() == expected.stride()
    assert memory_format(found[0]) == memory_format(x)


@pytest.mark.parametrize("name", OTHERS)
def test_others_take_the_general_way(name):
    input, weight, options = OTHERS[name]
    assert small.plan(resolved(input, weight, **options), input, weight, True) is None


def test_plans_are_made_once():
    input, weight, options = CASES["standard"]
    geometry = resolved(input, weight, **options)
    x, w = torch.randn(input), torch.randn(weight)
    torch_backend.conv(x, w, None, geometry)
    before = small.plan.cache_info()
    torch_backend.conv(x, w, None, geometry)
    after = small.plan.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
