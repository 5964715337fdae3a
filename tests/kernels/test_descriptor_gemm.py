import math

import pytest
import torch

from acs_triton.activations import activate
from acs_triton.kernels import descriptor_gemm, descriptor_tables
from acs_triton.kernels import device as triton_device
from acs_triton.kernels.descriptor_tables import LARGE_BOX, SMALL_BOX, Tile
from acs_triton.layout import memory_format

from . import oracle
from .cases import CASES, LAYOUTS, Case
from .test_gather_gemm import strided_inputs

SOME = CASES[::7] if triton_device.INTERPRETED else CASES
"""All where they are compiled: the interpreter takes its time to fetch boxes."""
STRIDED = [
    Case(16, 24, (6, 4, 8), stride=(2, 2, 2)),
    Case(24, 17, (4, 6, 3), stride=(2, 2, 1), layout="ncdhw"),
    Case(8, 9, (8, 4, 4), stride=(4, 2, 1), batch=1),
    Case(8, 9, (2, 4, 12), kernel=(2, 2), padding=(0, 0), stride=(1, 2, 4)),
    Case(40, 6, (6, 8, 10), kernel=(5, 5), padding=(2, 1), stride=(2, 2, 2), batch=1),
    Case(8, 9, (8, 6, 8), dilation=2, padding=(2, 1), stride=(2, 2, 2)),
    Case(8, 9, (6, 8, 4), rule="aligned", stride=(2, 2, 2)),
    Case(16, 7, (6, 4, 4), split=(), stride=(2, 2, 2)),
    Case(32, 12, (4, 6, 4), groups=2, stride=(2, 2, 2)),
]
"""Convolutions that read classes of positions."""
FORWARD = [case for case in SOME if descriptor_tables.has_classes(case.geometry)]
FORWARD += STRIDED[::3] if triton_device.INTERPRETED else STRIDED


@pytest.fixture
def use(copy_engine, monkeypatch):
    """``use(tile)`` makes the kernel take a tile whatever the shape."""

    def use(tile):
        monkeypatch.setattr(descriptor_gemm, "conv_tile", lambda *facts: tile)
        monkeypatch.setattr(descriptor_gemm, "input_grad_tile", lambda *facts: tile)

    return use


def small_tile(dtype, merged=False):
    return Tile(64, SMALL_BOX, 32 if dtype.itemsize == 2 else 16, 4, 2, merged)


def run_conv(case, make, dtype, merged=False, activation=""):
    geometry = case.geometry
    x = make(case.input_shape, dtype, 1, LAYOUTS[case.layout])
    w, b = make(case.weight_shape, dtype, 2), make((case.out_channels,), dtype, 3)
    y = descriptor_gemm.conv(x, w, b, geometry, activation)
    assert y.dtype == dtype
    assert memory_format(y) == memory_format(x)
    expected = oracle.conv(x, w, b, geometry)
    magnitude = (2 if activation else 1) * oracle.conv(*map(oracle.absolute, (x, w, b)), geometry)
    expected = activate(expected, activation) if activation else expected
    oracle.check(y, expected, magnitude, w[0].numel(), merged=merged or geometry.mixed)


def run_input_grad(case, make, dtype, merged=False):
    geometry = case.geometry
    g = make(case.output_shape, dtype, 1, LAYOUTS[case.layout])
    w = make(case.weight_shape, dtype, 2)
    x = descriptor_gemm.input_grad(g, w, geometry)
    assert x.dtype == dtype
    assert memory_format(x) == memory_format(g)
    magnitude = oracle.input_grad(g.abs(), w.abs(), geometry)
    oracle.check(x, oracle.input_grad(g, w, geometry), magnitude, w[:, 0].numel(), merged=merged or geometry.mixed)


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_conv(case, use, make, main_dtype):
    use(small_tile(main_dtype, merged=case.geometry.mixed))
    run_conv(case, make, main_dtype)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_input_grad(case, use, make, main_dtype):
    use(small_tile(main_dtype, merged=case.geometry.mixed))
    run_input_grad(case, make, main_dtype)


@pytest.mark.parametrize(
    "case", [Case(16, 24, (5, 4, 6), batch=1), Case(8, 6, (3, 4, 4), kernel=(5, 5), padding=(2, 2))]
)
def test_merged_taps(case, use, make, main_dtype):
    """All views in one tile of output channels: 19 and 61 taps in several rectangles."""
    use(small_tile(main_dtype, merged=True))
    run_conv(case, make, main_dtype, merged=True)
    run_input_grad(case, make, main_dtype, merged=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype, use, make):
    case = Case(24, 17, (3, 2, 5), batch=1)
    use(small_tile(dtype))
    run_conv(case, make, dtype)
    run_input_grad(case, make, dtype)


@pytest.mark.parametrize(("channels", "box"), descriptor_tables.SHAPES)
def test_tiles(channels, box, use, make, main_dtype):
    """Volumes that the boxes cover in another order of the axes, ragged on every side."""
    case = Case(24, 70, (9, 5, 3), batch=1)
    use(Tile(channels, box, 32, 4, 3))
    assert descriptor_tables.axis_order((9, 5, 3), box) != (0, 1, 2)
    run_conv(case, make, main_dtype)
    run_input_grad(case, make, main_dtype)


def test_activation(use, make, main_dtype):
    use(small_tile(main_dtype))
    run_conv(Case(16, 9, (2, 3, 4)), make, main_dtype, activation="silu")


def test_strided_inputs(use, make):
    use(small_tile(torch.float32))
    w = make((7, 16, 3, 3), torch.float32, 2)
    for name, x in strided_inputs(make):
        x = x[:1, :, :3, :4, :5]
        geometry = Case(16, 7, tuple(x.shape[2:])).geometry
        if name.startswith("expanded"):
            continue  # the dispatcher sends strides of zero to the gather GEMM
        y = descriptor_gemm.conv(x, w, None, geometry)
        assert memory_format(y) == memory_format(x), name
        oracle.check(y, oracle.conv(x, w, None, geometry), oracle.conv(x.abs(), w.abs(), None, geometry), 144)


def test_non_finite_input_stays_in_its_receptive_field(use, make):
    """An infinite value at one position of one group makes no other output NaN or infinite."""
    use(Tile(64, SMALL_BOX, 16, 4, 2))
    case = Case(32, 24, (6, 6, 6), groups=2, batch=1)
    x, w = make(case.input_shape, torch.float32, 1), make(case.weight_shape, torch.float32, 2)
    x[0, 3, 2, 2, 2] = float("inf")
    reached = torch.zeros(case.input_shape)
    reached[0, 3, 2, 2, 2] = 1
    reached = oracle.conv(reached, torch.ones(case.weight_shape), None, case.geometry) > 0
    assert torch.equal(descriptor_gemm.conv(x, w, None, case.geometry).cpu().isfinite(), ~reached)


def test_non_finite_values_stay_in_the_cube(use, make):
    """The three views' taps lie in a cube around a position; what lies outside it stays finite."""
    case = Case(8, 24, (7, 7, 7), batch=1)
    cube = torch.zeros(7, 7, 7, dtype=torch.bool)
    cube[2:5, 2:5, 2:5] = True
    w = make(case.weight_shape, torch.float32, 2)
    for merged in (False, True):
        use(small_tile(torch.float32, merged))
        g = make(case.output_shape, torch.float32, 1)
        g[0, 5, 3, 3, 3] = float("nan")
        x = descriptor_gemm.input_grad(g, w, case.geometry).cpu()
        assert x[0, :, ~cube].isfinite().all()
        assert x[0, :, 3, 3, 3].isnan().all()
    x = make(case.input_shape, torch.float32, 1)
    x[0, 5, 3, 3, 3] = float("nan")
    y = descriptor_gemm.conv(x, w, None, case.geometry).cpu()  # merged
    assert y[0, :, ~cube].isfinite().all()
    assert y[0, :, 3, 3, 3].isnan().all()


def test_repeated_calls_copy_nothing_to_the_device(use, make, monkeypatch):
    use(small_tile(torch.float16))
    case = Case(8, 8, (2, 3, 4), kernel=(1, 1), padding=(0, 0))
    geometry = case.geometry
    x, w = make(case.input_shape, torch.float16, 1), make(case.weight_shape, torch.float16, 2)
    y = descriptor_gemm.conv(x, w, None, geometry)
    descriptor_gemm.input_grad(y, w, geometry)

    def refuse(*args, **kwargs):
        raise AssertionError("a table was built again")

    monkeypatch.setattr(torch, "tensor", refuse)
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    assert torch.equal(descriptor_gemm.conv(x, w, None, geometry), y)
    descriptor_gemm.input_grad(y, w, geometry)


def test_grids_are_the_taps_in_their_order():
    for case in CASES:
        for view in {view for view, _, _ in case.geometry.views} | {3}:
            taps, found = list(case.geometry.taps(view)), []
            for grid in descriptor_tables.grids(taps):
                assert grid.number == len(found)
                for n in range(grid.count):
                    j, i = divmod(n, grid.row)
                    found.append(tuple(a + i * v + j * u for a, v, u in zip(grid.first, grid.v, grid.u, strict=True)))
            assert found == taps
    assert len(descriptor_tables.grids(Case(8, 9, (5, 5, 5)).geometry.merged.positions)) == 3


@pytest.mark.parametrize("of_twice", [False, True])
def test_reciprocals_divide_exactly(of_twice):
    """As the kernel multiplies: the upper half of the 64-bit product of unsigned 32-bit numbers."""
    for divisor in [*range(1 if of_twice else 2, 70), 128, 1000, 4095]:
        factor = descriptor_tables.reciprocal(divisor, of_twice) % 2**32
        largest = 2**31 // divisor - 1
        for count in [*range(200), largest // divisor * divisor - 1, largest // divisor * divisor, largest]:
            assert ((1 + of_twice) * count * factor) >> 32 == count // divisor


def test_boxes_take_the_order_of_axes_with_the_least_waste():
    assert descriptor_tables.axis_order((32, 32, 32), LARGE_BOX) == (0, 1, 2)
    assert descriptor_tables.axis_order((32, 32, 4), LARGE_BOX) == (2, 0, 1)
    for size in ((7, 9, 33), (1, 64, 64), (12, 10, 14)):
        for box in (LARGE_BOX, SMALL_BOX):
            order = descriptor_tables.axis_order(size, box)
            assert sorted(order) == [0, 1, 2]
            boxes = math.prod(-(-size[axis] // extent) for axis, extent in zip(order, box, strict=True))
            assert boxes <= math.prod(-(-n // extent) for n, extent in zip(size, box, strict=True))
