"""Programs that share the steps of a tile: both GEMMs, whatever the heuristic would take here."""

import pytest
import torch

from acs_triton.kernels import gather_gemm, split_depth, tiles

from . import oracle
from . import test_descriptor_gemm as descriptors
from . import test_gather_gemm as gathering
from .cases import CASES, LAYOUTS, TYPICAL, Case
from .test_descriptor_gemm import small_tile, use  # noqa: F401 - a fixture

SOME = [*TYPICAL, CASES[19], Case(40, 24, (3, 4, 5), layout="ncdhw"), Case(16, 22, (3, 5, 4), stride=(2, 2, 2))]
"""Whole vectors and none, both layouts, strides, groups, mixed views, and jobs of one step and of many."""


@pytest.fixture(params=[2, 7])
def splits(request, monkeypatch):
    """More than some jobs have steps."""
    monkeypatch.setattr(split_depth, "count", lambda *arguments: request.param)
    return request.param


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gather_gemm(case, splits, make, main_dtype):
    gathering.run_conv(case, make, main_dtype)
    gathering.run_input_grad(case, make, main_dtype)


@pytest.mark.parametrize("case", [case for case in SOME if case.stride == (1, 1, 1) and case.groups == 1], ids=str)
def test_descriptor_gemm(case, splits, use, make, main_dtype):  # noqa: F811 - a fixture
    use(small_tile(main_dtype, merged=case.split == ()))
    descriptors.run_conv(case, make, main_dtype, activation="silu")
    descriptors.run_input_grad(case, make, main_dtype)


def test_descriptor_gemm_of_several_classes(splits, use, make, main_dtype):  # noqa: F811 - a fixture
    """The input gradient at a stride: jobs of different numbers of steps write the same columns' sums."""
    use(small_tile(main_dtype))
    descriptors.run_input_grad(Case(16, 22, (3, 5, 4), stride=(2, 2, 2), batch=1), make, main_dtype)


def test_the_same_call_gives_the_same_bits(splits, make, main_dtype):
    case = Case(40, 24, (3, 4, 5))
    x, w = make(case.input_shape, main_dtype, 1, LAYOUTS[case.layout]), make(case.weight_shape, main_dtype, 2)
    first = gather_gemm.conv(x, w, None, case.geometry)
    assert all(torch.equal(gather_gemm.conv(x, w, None, case.geometry), first) for _ in range(2))


def test_layers_of_few_positions_are_split(device, make):
    """As the heuristic decides for the device that is there."""
    case = Case(512, 512, (2, 2, 2), batch=1)
    x, w = make(case.input_shape, torch.float16, 1, LAYOUTS[case.layout]), make(case.weight_shape, torch.float16, 2)
    tile = gather_gemm.conv_tile(512, 512, torch.float16, case.geometry)
    y = make(case.output_shape, torch.float16)
    split = split_depth.count((tile.bm, tile.bn, tile.bk), 9, 9 * 512 // tile.bk, y, 9 * tile.bn)
    assert device.interpreted or split > 4
    magnitude = oracle.conv(x.abs(), w.abs(), None, case.geometry)
    y = gather_gemm.conv(x, w, None, case.geometry)
    oracle.check(y, oracle.conv(x, w, None, case.geometry), magnitude, 9 * 512)


@pytest.mark.parametrize("channels", [512, 4096])
def test_sums_fit_into_the_workspace(channels, device, make):
    y = make((1, channels, 3, 16, 16), torch.float16)
    splits = split_depth.count((128, 64, 64), 1, 10**4, y, channels)
    assert 1 <= splits <= max(1, tiles.MAX_WORKSPACE // (4 * y.numel()))
