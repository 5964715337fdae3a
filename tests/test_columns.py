"""The CPU's products over columns: their numbers, and where they are chosen."""

from dataclasses import replace

import pytest
import torch

from acs_triton.arguments import conv_params
from acs_triton.backends import columns, cpu_cost
from acs_triton.backends import torch as torch_backend
from acs_triton.layout import memory_format

CASES = [
    ((2, 5, 3, 4, 2), (7, 5, 3, 3), {"padding": 1}),
    ((1, 4, 5, 4, 6), (9, 4, 3, 3), {"padding": 1, "stride": 2}),
    ((2, 3, 4, 5, 5), (6, 3, 2, 2), {"padding": 1, "dilation": 2}),
    ((1, 6, 3, 3, 3), (5, 6, 5, 5), {"padding": 2}),
    ((1, 6, 4, 3, 3), (8, 6, 1, 1), {"stride": 2}),
    ((1, 4, 3, 3, 4), (6, 4, 3, 3), {"padding": 1, "split": (0, 6, 0)}),
    ((1, 2, 1, 9, 9), (3, 2, 3, 3), {"padding": (5, 0, 0)}),  # some samples miss the input altogether
]


def resolved(input, weight, stride=1, padding=0, dilation=1, split=None):
    return conv_params(weight[2:], weight[0], stride, padding, dilation, 1, split).geometry(input[2:])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
def test_numbers_and_formats(case, format, monkeypatch):
    input, weight, options = case
    geometry = resolved(input, weight, **options)
    generator = torch.Generator().manual_seed(0)
    x, w, b, g = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (input, weight, weight[:1], (input[0], weight[0], *geometry.output_size))
    )
    x, g = (one.contiguous(memory_format=format) for one in (x, g))
    expected = torch_backend.conv(x, w, b, geometry), *torch_backend.gradients(g, x, w, geometry)
    plan = cpu_cost.plan
    monkeypatch.setattr(cpu_cost, "plan", lambda *args: replace(plan(*args), by_columns=True))
    found = [columns.conv(x, w, b, geometry), *torch_backend.gradients(g, x, w, geometry)]
    found += [torch_backend.input_grad(g, w, geometry), torch_backend.weight_grad(g, x, geometry)]
    for one, wanted in zip(found, (*expected, *expected[1:]), strict=True):
        torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(columns.conv(x, w, None, geometry), expected[0] - b.view(-1, 1, 1, 1))
    assert memory_format(found[1]) == memory_format(g)
    assert found[2].is_contiguous()


@pytest.mark.parametrize(
    ("channels", "size", "stride", "gradients", "forward"),
    [
        (512, 3, 1, True, True),
        (512, 6, 1, False, False),
        (128, 3, 1, True, False),
        (64, 3, 1, False, False),
        (128, 4, 2, False, False),
        (512, 4, 2, True, True),
    ],
)
def test_chosen_for_few_positions_and_large_kernels(channels, size, stride, gradients, forward):
    geometry = resolved((1, channels, *(size,) * 3), (channels, channels, 3, 3), stride, 1)
    x = torch.empty(1, channels, size, size, size).contiguous(memory_format=torch.channels_last_3d)
    g = torch.empty(1, channels, *geometry.output_size).contiguous(memory_format=torch.channels_last_3d)
    w = torch.empty(channels, channels, 3, 3)
    assert cpu_cost.plan(geometry, g, x, (True, True)).by_columns == gradients
    assert cpu_cost.by_columns(geometry, x, w) == forward
    assert not cpu_cost.by_columns(geometry, x.contiguous(), w)
    assert not cpu_cost.plan(geometry, g.double(), x.double(), (True, True)).by_columns
