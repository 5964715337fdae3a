import pytest
import torch
from hypothesis import HealthCheck, given, settings

from acs_triton.geometry import ConvParams
from acs_triton.kernels import tiles, weight_grad

from . import oracle
from .cases import CASES, LAYOUTS, TYPICAL, Case, random_cases


@pytest.fixture
def many_splits(monkeypatch):
    """One step a program: the depth is split as far as it goes."""
    monkeypatch.setattr(tiles, "steps_per_split", lambda jobs, steps, most, multiprocessors: 1)


def run(case, make, dtype, offset=0):
    geometry = case.geometry
    g = make(case.output_shape, dtype, 1, LAYOUTS[case.layout])
    x = make(case.input_shape, dtype, 2, LAYOUTS[case.layout], offset)
    w = weight_grad.weight_grad(g, x, geometry)
    assert w.dtype == dtype
    assert w.is_contiguous()
    terms = g[:, 0].numel()
    oracle.check(w, oracle.weight_grad(g, x, geometry), oracle.weight_grad(g.abs(), x.abs(), geometry), terms)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, make, main_dtype):
    run(case, make, main_dtype)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_dtypes(case, make, dtype):
    run(case, make, dtype)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", [CASES[i] for i in (12, 25)], ids=str)
def test_merged_or_view_by_view(case, merged, make, main_dtype, monkeypatch):
    """Both ways compute every convolution, whichever would be less work."""
    monkeypatch.setattr(weight_grad, "_merging", lambda geometry: (merged,))
    run(case, make, main_dtype)


@pytest.mark.parametrize(("channels", "merged"), [(16, True), (32, False), (64, False), (128, False)])
def test_taps_are_merged_where_that_is_less_work(channels, merged, device):
    tile = weight_grad.weight_grad_tile(channels, channels, torch.float16, Case(channels, channels, (8, 8, 8)).geometry)
    assert tile.merged == merged


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_cases())
def test_random_configurations(case, make):
    run(case, make, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "split", "rows"), [(3, (1, 0, 0), 3), (5, (0, 1, 0), 9), (3, (), 7), (5, (), 22), (7, (), 43)]
)
def test_few_programs_cover_the_taps(kernel, split, rows):
    """Nineteen merged taps are seven rows of up to three."""
    geometry = Case(8, 1, (9, 9, 9), kernel=(kernel, kernel), padding=(kernel // 2,) * 2, split=split).geometry
    positions = geometry.merged.positions
    found = weight_grad.tap_rows(positions, 3)
    assert len(found) == rows
    assert sorted(number for numbers, _ in found for number in numbers) == list(range(len(positions)))
    for numbers, axis in found:
        others = {(*positions[number][:axis], *positions[number][axis + 1 :]) for number in numbers}
        assert len(others) == 1
        assert len(numbers) <= 3


@pytest.mark.parametrize("kernel", [(1, 4), (5, 1), (2, 5)])
def test_kernel_rows(kernel, make, main_dtype):
    """Kernels whose longer side is not the last one, and rows that are no multiple of a program's taps."""
    run(Case(8, 4, (4, 6, 7), kernel=kernel, rule="planar", split=(4, 0, 0), padding=(0, 0)), make, main_dtype)


@pytest.mark.parametrize("exact", [False, True])
def test_tiles(exact, make, fp32_precision, monkeypatch, device):
    """Every tile that the heuristic can choose."""
    fp32_precision("ieee" if exact else "tf32")
    dtype = torch.float32 if exact else torch.float16
    for tile in tiles.weight_tiles(dtype.itemsize, exact, device.shared_memory):
        monkeypatch.setattr(weight_grad, "weight_grad_tile", lambda *args, tile=tile: tile)
        kernel, padding = ((1, 1), (0, 0)) if tile.taps == 1 else ((3, 3), (1, 1))
        run(Case(72, 36, (2, 3, 5), kernel=kernel, padding=padding, batch=1, split=(36, 0, 0)), make, dtype)


@pytest.mark.parametrize("size", [(1, 1, 70), (3, 1, 1), (2, 5, 9), (2, 2, 2)])
def test_boxes(size, make, main_dtype, many_splits):
    """Volumes that boxes of positions cover in all ways, samples among them."""
    run(Case(8, 3, size, batch=4), make, main_dtype)


def test_misaligned_input(make, device):
    run(TYPICAL[0], make, torch.float16, offset=1)


def test_strided_operands(make, device):
    params = ConvParams((3, 3), (1, 1, 1), (1,) * 4, (1,) * 4, (1,) * 4, 1, (3, 3, 2))
    whole = make((3, 24, 5, 9, 6), torch.float32, 1, torch.channels_last_3d)
    g = make((2, 8, 5, 4, 4), torch.float32, 2)
    for x in (whole[1:, 8:16, :, ::2][:, :, :, :4, 1:5], whole[:2, 3:11, :, 5:, :4]):
        geometry = params.geometry(x.shape[2:])
        for grad in (g, g[:1].expand(2, -1, -1, -1, -1), g[:1, :1, :1, :1, :1].expand(2, 8, 5, 4, 4)):
            magnitude = oracle.weight_grad(grad.abs(), x.abs(), geometry)
            expected = oracle.weight_grad(grad, x, geometry)
            oracle.check(weight_grad.weight_grad(grad, x, geometry), expected, magnitude, 160)


def test_repeats_bit_by_bit(make, device, many_splits):
    case = Case(16, 3, (5, 6, 7))
    g = make(case.output_shape, torch.float32, 1)
    x = make(case.input_shape, torch.float32, 2)
    first, second = (weight_grad.weight_grad(g, x, case.geometry) for _ in range(2))
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_non_finite_values_stay_in_their_rows(make, device):
    """NaN in one gradient channel and infinity in one input channel reach the weights between them only."""
    case = Case(16, 12, (3, 4, 5), groups=2, batch=1)
    g, x = make(case.output_shape, torch.float32, 1), make(case.input_shape, torch.float32, 2)
    g[0, 4, 1, 1, 1] = float("nan")
    x[0, 11, 1, 2, 2] = float("inf")
    finite = weight_grad.weight_grad(g, x, case.geometry).cpu().isfinite()
    expected = torch.ones(12, 8, 3, 3, dtype=torch.bool)
    expected[4] = False
    expected[6:, 3] = False
    assert finite[expected].all()
    assert not finite[4].any()


@pytest.mark.parametrize(("merged", "taps"), [(False, 9), (True, 19)])
def test_workspace_is_bounded(merged, taps, make, device, monkeypatch, many_splits):
    """Output channels are computed in chunks where their partial sums would not fit together."""
    sizes = []
    empty = torch.empty
    case = Case(16, 50, (2, 3, 4), batch=1, split=(20, 20, 10))
    monkeypatch.setattr(weight_grad, "_merging", lambda geometry: (merged,))
    monkeypatch.setattr(tiles, "MAX_WORKSPACE", 32 * taps * 16 * 4)
    weight_grad._plan.cache_clear()
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k)) or sizes[-1])
    run(case, make, torch.float32)
    weight_grad._plan.cache_clear()
    partial = [t.nbytes for t in sizes if t.ndim == 2]
    assert len(partial) > 1
    assert max(partial) <= tiles.MAX_WORKSPACE


def test_repeated_calls_copy_nothing_to_the_device(make, device, monkeypatch):
    case = TYPICAL[0]
    g, x = make(case.output_shape, torch.float16, 1), make(case.input_shape, torch.float16, 2)
    first = weight_grad.weight_grad(g, x, case.geometry)

    def refuse(*args, **kwargs):
        raise AssertionError("a table was built again")

    monkeypatch.setattr(torch, "tensor", refuse)
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    assert torch.equal(weight_grad.weight_grad(g, x, case.geometry), first)


def test_empty_batch(device):
    case = TYPICAL[0]
    to = {"dtype": torch.float16, "device": device.torch_device}
    g, x = torch.empty((0, *case.output_shape[1:]), **to), torch.empty((0, *case.input_shape[1:]), **to)
    w = weight_grad.weight_grad(g, x, case.geometry)
    assert w.shape == case.weight_shape
    assert not w.any()
