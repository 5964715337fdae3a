"""Weights of merged taps, and sums of planes, against the definition tap by tap."""

from dataclasses import replace

import pytest
import torch

from acs_triton.arguments import conv_params
from acs_triton.backends import mixed
from acs_triton.merging import merge, unmerge

OPTIONS = {
    "3x3": {},
    "2x2": {"kernel": (2, 2), "padding": 0},
    "2x2, through the first tap": {"kernel": (2, 2), "padding": 0, "stride": 2},
    "5x5": {"kernel": (5, 5), "padding": 2},
    "off the grid": {"dilation": 2, "padding": 0},
    "1x7": {"kernel": (1, 7), "padding": (0, 3)},
}


def geometry(kernel=(3, 3), padding=1, stride=1, dilation=1, split=(2, 0, 3)):
    params = conv_params(kernel, 5, stride, padding, dilation, 1, None)
    return replace(params, split=split).geometry((8, 8, 10))


@pytest.mark.parametrize("split", [(), (2, 0, 3), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_merge_adds_up_what_reads_a_position(options, split):
    found = geometry(**OPTIONS[options], split=split)
    weight = torch.randn(5, 2, *(() if split else (3,)), *found.kernel_size, dtype=torch.float64)
    merged = merge(weight, found)
    views = [(view, range(5)) for view in range(3)]
    views = views if not split else [(view, range(first, end)) for view, first, end in found.views]
    expected = torch.zeros(5, 2, len(found.merged.positions), dtype=torch.float64)
    for view, channels in views:
        for tap, position in enumerate(found.taps(view)):
            for channel in channels:
                kernel = weight[channel] if split else weight[channel, :, view]
                expected[channel, :, found.merged.positions.index(position)] += kernel.flatten(1)[:, tap]
    torch.testing.assert_close(merged, expected)
    if not split:
        gradient = torch.randn_like(merged)
        back = unmerge(gradient, found)
        assert back.shape == weight.shape
        torch.testing.assert_close((merged * gradient).sum(), (weight * back).sum())


@pytest.mark.parametrize(
    ("options", "taps"),
    [("3x3", 19), ("2x2", 7), ("2x2, through the first tap", 7), ("5x5", 75), ("off the grid", 27), ("1x7", 21)],
)
def test_planes_take_every_position_once_where_they_can(options, taps):
    found = geometry(**OPTIONS[options], split=())
    planes = mixed.fewest_taps(found, 5)
    positions = [position for _, plane in planes.planes for position in plane.merged.positions]
    assert len(positions) == taps
    assert planes.merged == (taps == len(found.merged.positions))
    assert set(positions) == set(found.merged.positions)
    if planes.merged:
        assert tuple(positions) == found.merged.positions
