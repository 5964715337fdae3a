import math

import pytest
import torch

from acs_triton.kernels import descriptor_weight_grad as kernel
from acs_triton.kernels import device as triton_device
from acs_triton.kernels.descriptor_tables import has_classes
from acs_triton.kernels.descriptor_weight_grad import CUBE, ROW, Tile

from . import oracle
from .cases import CASES, LAYOUTS, Case
from .test_descriptor_gemm import STRIDED

SOME = [case for case in CASES + STRIDED if has_classes(case.geometry) and not case.geometry.mixed]
SOME = SOME[1::9] if triton_device.INTERPRETED else SOME
"""All where they are compiled: the interpreter takes its time to fetch boxes."""


@pytest.fixture
def use(copy_engine, monkeypatch):
    """``use(box, taps)`` makes the kernel take that tile."""

    def use(box, taps):
        tile = Tile(64, 64, box, taps, 4, 2)
        monkeypatch.setattr(kernel, "weight_grad_tile", lambda *facts: tile)

    return use


def run(case, make, dtype):
    geometry = case.geometry
    g = make(case.output_shape, dtype, 1, LAYOUTS[case.layout])
    x = make(case.input_shape, dtype, 2, LAYOUTS[case.layout])
    w = kernel.weight_grad(g, x, geometry)
    assert w.dtype == dtype
    magnitude = oracle.weight_grad(g.abs(), x.abs(), geometry)
    oracle.check(w, oracle.weight_grad(g, x, geometry), magnitude, case.batch * math.prod(geometry.output_size))
    return w


@pytest.mark.parametrize("case", SOME, ids=str)
def test_cases(case, use, make, device):
    use(CUBE, 1 if case.kernel == (1, 1) else 3)
    run(case, make, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("box", [ROW, CUBE])
def test_tiles(box, dtype, use, make):
    """Two tiles of channels on both sides, windows that start inside a vector, boxes in another order of the axes."""
    use(box, 3)
    run(Case(72, 75, (5, 1, 2), batch=1), make, dtype)


def test_splits_and_chunks(use, make, monkeypatch):
    """Many splits, and a workspace for few channels at a time; bit by bit the same every time."""
    use(ROW, 3)
    case = Case(8, 80, (5, 3, 4), kernel=(2, 2), padding=(1, 0))
    monkeypatch.setattr(kernel.tiles, "steps_per_split", lambda *facts: 7)
    monkeypatch.setattr(kernel.tiles, "MAX_WORKSPACE", 16 * 4 * 8 * 4)
    kernel._plan.cache_clear()
    w = run(case, make, torch.float16)
    assert torch.equal(run(case, make, torch.float16), w)
    kernel._plan.cache_clear()
