import itertools
import math

import pytest

from acs_triton.geometry import default_split
from acs_triton.kernels import tiles

SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "gfx942": 65536}


def tile(columns, depths, itemsize=2, exact=False, arch="sm_80"):
    return tiles.gemm_tile(columns, depths, itemsize, exact, SHARED_MEMORY[arch])


@pytest.mark.parametrize(
    ("out_channels", "bm", "bn"),
    [
        (16, 128, 16),
        (24, 128, 16),
        (48, 128, 16),
        (64, 128, 32),
        (96, 128, 32),
        (128, 128, 64),
        (192, 128, 64),
        (256, 64, 128),
        (384, 64, 128),
        (512, 128, 64),
    ],
)
def test_columns_follow_the_split(out_channels, bm, bn):
    """A view has a third of the channels: 64 columns would be two thirds empty at 64 channels."""
    chosen = tile(default_split(out_channels), [64])
    assert (chosen.bm, chosen.bn) == (bm, bn)


@pytest.mark.parametrize(("channels", "bk"), [(16, 32), (32, 32), (64, 64), (96, 32), (128, 64), (256, 64), (22, 32)])
def test_depth_follows_the_channels(channels, bk):
    assert tile([64], [channels]).bk == bk


def test_stages_follow_shared_memory():
    assert tile([64], [64], arch="sm_90").num_stages > tile([64], [64], arch="gfx942").num_stages


def arguments():
    return itertools.product(
        ([5], [22, 21, 21], [43, 43, 42], [64], [171, 171, 170], [256], [8] * 64, [32] * 32, [64] * 8),
        ([8], [22, 21, 21], [32], [64], [96], [512]),
        itertools.product((2, 4, 8), (False, True), SHARED_MEMORY.values()),
    )


def test_the_lists_hold_what_can_be_chosen():
    """Compile tests go by these lists."""
    chosen = {}
    for columns, depths, facts in arguments():
        gemm, weight = chosen.setdefault(facts, (set(), set()))
        gemm.add(tiles.gemm_tile(columns, depths, *facts))
        weight.update(tiles.weight_tile(depths[0], columns, taps, *facts) for taps in (1, 3, 9))
    for facts, (gemm, weight) in chosen.items():
        assert gemm == set(tiles.gemm_tiles(*facts))
        assert weight == set(tiles.weight_tiles(*facts))


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("itemsize", "exact"), [(2, False), (4, False), (4, True)])
def test_every_tile_fits(arch, itemsize, exact):
    shared = SHARED_MEMORY[arch]
    for t in tiles.gemm_tiles(itemsize, exact, shared):
        assert t.num_warps <= 4
        assert (t.bm + t.bn) * t.bk * itemsize * t.num_stages <= shared
    for t in tiles.weight_tiles(itemsize, exact, shared):
        assert t.num_warps <= 4
        assert (t.taps * t.bc + t.bo) * t.bk * itemsize * t.num_stages <= shared


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 32, 32, 32), (1, 1, 2, 32)),
        ((2, 7, 7, 7), (1, 1, 8, 8)),
        ((32, 2, 2, 2), (8, 2, 2, 2)),
        ((3, 2, 2, 2), (1, 2, 2, 16)),
        ((1, 1, 1, 5), (1, 1, 1, 64)),
        ((64, 1, 1, 1), (64, 1, 1, 1)),
    ],
)
def test_box(size, box):
    assert tiles.box(size, 64) == box


def test_boxes_waste_nothing_where_they_fit():
    for size in itertools.product((1, 2, 8), (4, 16), (4, 8), (4, 32)):
        box = tiles.box(size, 64)
        assert math.prod(box) == 64
        assert size[0] % box[0] == 0
        assert all(n % b == 0 for n, b in zip(size, box, strict=True))


@pytest.mark.parametrize(("jobs", "steps", "most"), [(1, 1, 10), (18, 5000, 50), (1000, 5000, 50), (18, 5000, 3)])
def test_splits(jobs, steps, most):
    per_split = tiles.steps_per_split(jobs, steps, most, 108)
    splits = -(-steps // per_split)
    assert splits <= max(1, most)
    assert splits * jobs <= max(jobs, 2 * 108)
    assert (splits - 1) * per_split < steps, "no program is without steps"


def gemm_splits(programs, steps, sums, multiprocessors=108, most=100):
    return tiles.gemm_splits((128, 64, 64), programs, steps, most, sums, 32, multiprocessors)


@pytest.mark.parametrize(
    ("programs", "steps", "sums", "splits"),
    [
        (108, 72, 108 * 128 * 64, 1),  # every multiprocessor has a tile
        (1000, 9, 1000 * 128 * 64, 1),
        (9, 72, 27 * 512, 12),  # 512 channels at 3^3: a program for each multiprocessor
        (9, 1, 27 * 512, 1),  # nothing to share
        (9, 3, 27 * 512, 1),  # a second kernel takes longer than the steps
        (40, 18, 40 * 128 * 64, 1),
        (40, 72, 40 * 128 * 64, 3),
    ],
)
def test_steps_are_shared_where_tiles_leave_multiprocessors_idle(programs, steps, sums, splits):
    assert gemm_splits(programs, steps, sums) == splits


def test_every_split_has_steps():
    for programs, steps, most in itertools.product((1, 5, 50), (1, 2, 7, 72, 1000), (0, 1, 3, 50)):
        splits = gemm_splits(programs, steps, 10, 10**6, most)
        assert 1 <= splits <= max(1, most)
        assert (splits - 1) * -(-steps // splits) < steps, "no program is without steps"
