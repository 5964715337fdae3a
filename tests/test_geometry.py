"""Sizes, splits and offsets, against values worked out by hand."""

from dataclasses import replace

import pytest

from acs_triton.arguments import conv_params, planar_params
from acs_triton.geometry import default_split


def geometry(size, kernel=(3, 3), out_channels=3, stride=1, padding=0, dilation=1, rule="acsconv", **options):
    params = conv_params(
        kernel, out_channels, stride, padding, dilation, 1, options.pop("split", None), rule, **options
    )
    return params.geometry(size)


@pytest.mark.parametrize(("out", "split"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (64, (22, 21, 21))])
def test_default_split_gives_the_remainder_to_axial_then_coronal(out, split):
    assert default_split(out) == split


@pytest.mark.parametrize(
    ("arguments", "size", "out", "through"),
    [
        # Same padding: the sample stays in place.
        ({"padding": 1}, (5, 6, 7), (5, 6, 7), (0, 0, 0)),
        # Stride 2: half the size is not cropped; ceil(7 / 2) is, by k // 2 - padding = 0.
        ({"padding": 1, "stride": 2}, (6, 6, 7), (3, 3, 4), (0, 0, 0)),
        # Valid: crop to the centre.
        ({}, (5, 6, 7), (3, 4, 5), (1, 1, 1)),
        # Valid, and by chance half of the input: not cropped. 4 -> 2 at stride 1 cannot be uncropped.
        ({"stride": 2, "kernel": (2, 2)}, (6, 5, 4), (3, 2, 2), (0, 1, 0)),
        ({}, (4, 4, 4), (2, 2, 2), (1, 1, 1)),
        # Even kernels: one plane later where cropped.
        ({"kernel": (2, 2), "padding": 1}, (5, 5, 5), (6, 6, 6), (0, 0, 0)),
        ({"kernel": (2, 2)}, (5, 5, 5), (4, 4, 4), (1, 1, 1)),
        # Dilation is ignored by the published rule.
        ({"dilation": 2}, (7, 7, 7), (3, 3, 3), (1, 1, 1)),
        ({"dilation": 2, "rule": "aligned"}, (7, 7, 7), (3, 3, 3), (2, 2, 2)),
        ({"kernel": (2, 2), "stride": 2, "rule": "aligned"}, (6, 6, 6), (3, 3, 3), (1, 1, 1)),
    ],
)
def test_through_plane_offset(arguments, size, out, through):
    found = geometry(size, **arguments)
    assert found.output_size == out
    assert tuple(found.start[view][view] for view in range(3)) == through


def test_plane_axes_follow_the_kernel():
    found = geometry((5, 6, 7), kernel=(1, 7), padding=(0, 3))
    assert found.output_size == (5, 6, 7)
    assert found.start == ((0, 0, -3), (0, 0, -3), (0, -3, 0))
    assert [found.extent(view) for view in range(3)] == [(1, 1, 7), (1, 1, 7), (1, 7, 1)]


def test_views_that_disagree_are_refused():
    with pytest.raises(ValueError, match="different output sizes"):
        geometry((8, 8, 8), kernel=(1, 7), padding=1)


@pytest.mark.parametrize("view", range(3))
def test_planar_rule_leaves_the_through_plane_axis_alone(view):
    found = planar_params((3, 3), 4, 2, 1, 1, 1, view).geometry((6, 7, 9))
    assert found.output_size == (3, 4, 5)
    assert [found.start[view][axis] for axis in range(3)] == [0 if axis == view else -1 for axis in range(3)]
    assert found.views == ((view, 0, 4),)


def test_a_prepadded_input_is_read_where_the_padded_one_would_be():
    plain = geometry((7, 8, 9), padding=2, dilation=2, stride=2)
    padded = geometry((11, 12, 13), padding=2, dilation=2, stride=2, prepadded=True)
    assert padded.output_size == plain.output_size
    assert [[n + 2 for n in view] for view in plain.start] == [list(view) for view in padded.start]


@pytest.mark.parametrize(
    ("taps", "options"),
    [
        (1, {"kernel": (1, 1)}),
        (7, {"kernel": (2, 2), "padding": 1}),
        (19, {"padding": 1}),
        (19, {"padding": 1, "stride": 2}),
        (61, {"kernel": (5, 5), "padding": 2}),
        (127, {"kernel": (7, 7), "padding": 3}),
        (13, {"kernel": (1, 7), "padding": (0, 3)}),
        # The published rule under dilation samples between the taps.
        (27, {"dilation": 2}),
        (19, {"dilation": 2, "rule": "aligned"}),
    ],
    ids=str,
)
def test_merged_taps(taps, options):
    """Each position of the three views is there once."""
    found = geometry((16, 17, 18), **options)
    mixed = replace(found, split=())
    assert found.merged == mixed.merged
    assert len(mixed.merged.positions) == len(set(mixed.merged.positions)) == taps
    for view in range(3):
        assert mixed.taps(view) == tuple(mixed.merged.positions[number] for number in mixed.merged.number[view])
    assert set(mixed.merged.positions) == {position for view in range(3) for position in mixed.taps(view)}


def test_merged_taps_are_those_of_views_with_channels():
    found = replace(geometry((5, 6, 7), padding=1), split=(0, 3, 3))
    assert len(found.merged.positions) == 15
    assert found.merged.number[0] == ()


def test_same_geometry_is_the_same_object():
    assert geometry((5, 6, 7), padding=1) is geometry((5, 6, 7), padding=1)
