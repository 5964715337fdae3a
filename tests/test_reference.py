"""The two independent forms of the reference agree with each other, and the first with a hand-worked case."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@given(
    st.sampled_from([1, 3, 5]),
    st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]),
    st.sampled_from([1, 2]),
    st.lists(st.integers(1, 7), min_size=3, max_size=3),
)
def test_definition_agrees_with_dense(k, spread_and_stride, groups, size):
    dilation, stride = spread_and_stride
    x, weight, bias = randn(2, 2 * groups, *size), randn(5 * groups, 2, k, k), randn(5 * groups)
    shares = randn(5 * groups, 3)
    options = {"stride": stride, "padding": dilation * (k // 2), "dilation": dilation, "groups": groups}
    split = (5 * groups - 3, 0, 3)
    one = reference.acs_conv3d(x, weight, bias, split=split, **options)
    two = reference.dense_acs_conv3d(x, weight, bias, split=split, **options)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    if min(size) > stride or stride == 1:
        one = reference.soft_acs_conv3d(x, weight, shares, bias, **options)
        two = reference.dense_soft_acs_conv3d(x, weight, shares, bias, **options)
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_one_voxel_shows_each_view():
    x = torch.zeros(1, 1, 3, 3, 3, dtype=torch.float64)
    x[0, 0, 1, 1, 1] = 1
    weight = torch.arange(1.0, 10, dtype=torch.float64).view(1, 1, 3, 3).repeat(3, 1, 1, 1)
    axial, coronal, sagittal = reference.acs_conv3d(x, weight, padding=1)[0]
    mirrored = weight[0, 0].flip(0, 1)
    assert torch.equal(axial[1], mirrored)
    assert torch.equal(coronal[:, 1], mirrored)
    assert torch.equal(sagittal[:, :, 1], mirrored)
    for view in (axial, coronal, sagittal):
        assert view.sum() == 45


def test_dense_form_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="odd square kernel"):
        reference.dense_acs_conv3d(randn(1, 1, 4, 4, 4), randn(3, 1, 2, 2), padding=1)
