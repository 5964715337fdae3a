import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from acs_triton.geometry import ConvParams
from acs_triton.kernels import device as triton_device
from acs_triton.kernels import gather_gemm, gather_tables, tiles
from acs_triton.layout import memory_format

from . import oracle
from .cases import CASES, LAYOUTS, TYPICAL, Case, random_cases


def run_conv(case, make, dtype, bias=True, offset=0):
    geometry = case.geometry
    x = make(case.input_shape, dtype, 1, LAYOUTS[case.layout], offset)
    w = make(case.weight_shape, dtype, 2)
    b = make((case.out_channels,), dtype, 3) if bias else None
    y = gather_gemm.conv(x, w, b, geometry)
    assert y.dtype == dtype
    assert memory_format(y) == memory_format(x)
    magnitude = oracle.conv(*map(oracle.absolute, (x, w, b)), geometry)
    oracle.check(y, oracle.conv(x, w, b, geometry), magnitude, w[0].numel(), merged=geometry.mixed)


def run_input_grad(case, make, dtype):
    geometry = case.geometry
    g = make(case.output_shape, dtype, 1, LAYOUTS[case.layout])
    w = make(case.weight_shape, dtype, 2)
    x = gather_gemm.input_grad(g, w, geometry)
    assert x.dtype == dtype
    assert memory_format(x) == memory_format(g)
    magnitude = oracle.input_grad(g.abs(), w.abs(), geometry)
    oracle.check(x, oracle.input_grad(g, w, geometry), magnitude, w[:, 0].numel(), merged=geometry.mixed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, make, main_dtype):
    run_conv(case, make, main_dtype)
    run_input_grad(case, make, main_dtype)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_dtypes(case, make, dtype):
    run_conv(case, make, dtype)
    run_input_grad(case, make, dtype)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 12, 20, 25)], ids=str)
def test_merged_or_view_by_view(case, merged, make, main_dtype, monkeypatch):
    """Both ways compute every convolution, whichever would be less work."""
    monkeypatch.setattr(gather_gemm, "merging", lambda *args, **kwargs: (merged,))
    run_conv(case, make, main_dtype)
    run_input_grad(case, make, main_dtype)


@pytest.mark.parametrize(
    ("arch", "channels", "conv", "input_grad"),
    [
        (80, 16, True, True),
        (80, 32, True, True),
        (80, 48, False, False),
        (80, 64, True, False),
        (80, 128, False, False),
        (90, 64, True, False),
        (90, 128, False, False),
        (89, 16, True, True),
        (89, 32, False, True),
        (89, 64, False, False),
    ],
)
def test_taps_are_merged_where_that_is_less_work(arch, channels, conv, input_grad, device, monkeypatch):
    """Padded products weigh more on GPUs that multiply more slowly."""
    facts = replace(device, arch=arch, backend="cuda")
    monkeypatch.setattr(triton_device, "current", lambda: facts)
    geometry = Case(channels, channels, (32, 32, 32)).geometry
    assert gather_gemm.conv_tile(channels, channels, torch.float16, geometry).merged == conv
    assert gather_gemm.input_grad_tile(channels, channels, torch.float16, geometry).merged == input_grad


def test_a_single_view_is_not_merged(device):
    for case in (Case(8, 8, (4, 5, 6), kernel=(1, 1), padding=(0, 0)), Case(8, 8, (4, 5, 6), split=(0, 8, 0))):
        assert not gather_gemm.conv_tile(8, 8, torch.float16, case.geometry).merged
        assert not gather_gemm.input_grad_tile(8, 8, torch.float16, case.geometry).merged


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_cases())
def test_random_configurations(case, make):
    run_conv(case, make, torch.float32, bias=False)
    run_input_grad(case, make, torch.float32)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [64, 128])
def test_tiles(columns, rows, exact, make, fp32_precision, monkeypatch):
    """Every shape of tile, whatever the heuristic would take here."""
    depth = 16 if exact else 32
    if rows * columns == 128 * 128 or (exact and (columns == 128 or rows == 128)):
        pytest.skip("not a tile that the heuristic chooses")
    tile = tiles.GemmTile(rows, columns, depth, 4, 2)
    monkeypatch.setattr(gather_gemm, "_tile", lambda *args: tile)
    fp32_precision("ieee" if exact else "tf32")
    case = Case(40, 70, (3, 4, 7), kernel=(2, 2), padding=(1, 0), batch=1)
    dtype = torch.float32 if exact else torch.float16
    run_conv(case, make, dtype)
    run_input_grad(case, make, dtype)


def test_ieee_precision(make, fp32_precision):
    """Without tf32, float32 results are those of float32 products."""
    fp32_precision("ieee")
    geometry = CASES[0].geometry
    x, w = make(CASES[0].input_shape, torch.float32, 1), make(CASES[0].weight_shape, torch.float32, 2)
    magnitude = oracle.conv(x.abs(), w.abs(), None, geometry)
    y = gather_gemm.conv(x, w, None, geometry)
    oracle.check(y, oracle.conv(x, w, None, geometry), magnitude, w[0].numel(), exact=True)


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_input(offset, make, device):
    run_conv(CASES[0], make, torch.float16, offset=offset)


def strided_inputs(make):
    """A tensor cut out of a larger one in several ways; the rest of the larger one is NaN."""
    whole = make((3, 32, 7, 6, 9), torch.float32, format=torch.channels_last_3d)
    cuts = {
        "channels": (slice(None), slice(8, 24)),
        "odd channels": (slice(None), slice(5, 21)),
        "positions": (slice(1, 3), slice(0, 16), slice(1, 6), slice(None, None, 2), slice(2, 9)),
    }
    for name, cut in cuts.items():
        values = whole[cut].clone()
        surrounded = torch.full_like(whole, float("nan"))
        surrounded[cut] = values
        yield name, surrounded[cut]
    yield "transposed", make((2, 16, 5, 4, 6), torch.float32).transpose(2, 4)
    yield (
        "expanded batch",
        make((1, 16, 3, 4, 5), torch.float32, format=torch.channels_last_3d).expand(3, -1, -1, -1, -1),
    )
    yield "expanded channels", make((2, 1, 3, 4, 5), torch.float32).expand(-1, 16, -1, -1, -1)
    yield "expanded all", make((1, 1, 1, 1, 1), torch.float32).expand(2, 16, 3, 4, 5)


def test_strided_inputs(make, device):
    w = make((7, 16, 3, 3), torch.float32, 2)
    for name, x in strided_inputs(make):
        params = ConvParams((3, 3), (1, 1, 1), (1,) * 4, (1,) * 4, (1,) * 4, 1, (3, 2, 2))
        geometry = params.geometry(x.shape[2:])
        y = gather_gemm.conv(x, w, None, geometry)
        assert memory_format(y) == memory_format(x), name
        oracle.check(y, oracle.conv(x, w, None, geometry), oracle.conv(x.abs(), w.abs(), None, geometry), 144)
    w = make((16, 5, 3, 3), torch.float32, 2)
    for _, g in strided_inputs(make):
        params = ConvParams((3, 3), (1, 1, 1), (1,) * 4, (1,) * 4, (1,) * 4, 1, (6, 5, 5))
        geometry = params.geometry(g.shape[2:])
        magnitude = oracle.input_grad(g.abs(), w.abs(), geometry)
        oracle.check(gather_gemm.input_grad(g, w, geometry), oracle.input_grad(g, w, geometry), magnitude, 144)


def test_strided_weight(make, device):
    geometry = CASES[0].geometry
    x = make(CASES[0].input_shape, torch.float32, 1)
    w = make((3, 3, 16, 24), torch.float32, 2).permute(3, 2, 1, 0)
    magnitude = oracle.conv(x.abs(), w.abs(), None, geometry)
    oracle.check(gather_gemm.conv(x, w, None, geometry), oracle.conv(x, w, None, geometry), magnitude, 144)


def test_empty_batch(make, device):
    geometry = CASES[0].geometry
    w = make(CASES[0].weight_shape, torch.float16)
    x = torch.empty((0, *CASES[0].input_shape[1:]), dtype=torch.float16, device=device.torch_device)
    assert gather_gemm.conv(x, w, None, geometry).shape == (0, *CASES[0].output_shape[1:])
    g = torch.empty((0, *CASES[0].output_shape[1:]), dtype=torch.float16, device=device.torch_device)
    assert gather_gemm.input_grad(g, w, geometry).shape == (0, *CASES[0].input_shape[1:])


def test_bias_is_added_before_rounding(make, device):
    """16 + 2**-7 is not a bfloat16 number, their sum with -16 is."""
    case = Case(8, 8, (2, 2, 2), kernel=(1, 1), padding=(0, 0), batch=1)
    x = torch.ones(case.input_shape, dtype=torch.bfloat16, device=device.torch_device)
    w = torch.zeros(case.weight_shape, dtype=torch.bfloat16, device=device.torch_device)
    w[:, 0], w[:, 1] = 16.0, 2.0**-7
    b = torch.full((8,), -16.0, dtype=torch.bfloat16, device=device.torch_device)
    assert gather_gemm.conv(x, w, b, case.geometry).cpu().eq(2.0**-7).all()


@pytest.mark.parametrize(("out_channels", "merged"), [(24, True), (96, False)])
def test_non_finite_input_stays_in_its_receptive_field(out_channels, merged, make, device):
    """An infinite value at one position of one group makes no other output NaN or infinite.

    Merged taps meet zero weights at other views' positions: the receptive field is that of mixed views.
    """
    case = Case(16, out_channels, (6, 6, 6), groups=2, batch=1)
    geometry = case.geometry
    assert gather_gemm.conv_tile(16, out_channels, torch.float32, geometry).merged == merged
    x, w = make(case.input_shape, torch.float32, 1), make(case.weight_shape, torch.float32, 2)
    x[0, 3, 2, 2, 2] = float("inf")
    reached = torch.zeros(case.input_shape)
    reached[0, 3, 2, 2, 2] = 1
    field = replace(case, split=()) if merged else case
    reached = oracle.conv(reached, torch.ones(field.weight_shape), None, field.geometry) > 0
    finite = gather_gemm.conv(x, w, None, geometry).cpu().isfinite()
    assert torch.equal(finite, ~reached)


def test_non_finite_gradient_stays_in_the_cube(make, device):
    """The three views' taps lie in a cube around a position; input gradients outside it stay finite."""
    case = Case(8, 24, (7, 7, 7), batch=1)
    g, w = make(case.output_shape, torch.float32, 1), make(case.weight_shape, torch.float32, 2)
    g[0, 5, 3, 3, 3] = float("nan")
    x = gather_gemm.input_grad(g, w, case.geometry).cpu()
    cube = torch.zeros(7, 7, 7, dtype=torch.bool)
    cube[2:5, 2:5, 2:5] = True
    assert x[0, :, ~cube].isfinite().all()
    assert x[0, :, 3, 3, 3].isnan().all()


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_in_parts(stride, make, device, monkeypatch):
    """A batch beyond 32-bit offsets is computed in parts; here with a small bound."""
    monkeypatch.setattr(gather_gemm, "MAX_INDEX", 1000)
    case = Case(16, 24, (5, 6, 7), stride=(stride,) * 3, batch=5)
    run_conv(case, make, torch.float32)
    run_input_grad(case, make, torch.float32)


def test_repeated_calls_copy_nothing_to_the_device(make, device, monkeypatch):
    geometry = CASES[0].geometry
    x, w = make(CASES[0].input_shape, torch.float16, 1), make(CASES[0].weight_shape, torch.float16, 2)
    y = gather_gemm.conv(x, w, None, geometry)
    gather_gemm.input_grad(y, w, geometry)

    def refuse(*args, **kwargs):
        raise AssertionError("a table was built again")

    monkeypatch.setattr(torch, "tensor", refuse)
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    assert torch.equal(gather_gemm.conv(x, w, None, geometry), y)
    gather_gemm.input_grad(y, w, geometry)


def test_sample_beyond_32_bits(device):
    """One sample of more than 2**31 elements; its far corner is compared with the corner computed alone."""
    if not device.hardware or torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB of free memory")
    shape, cut = (1, 16, 520, 520, 520), 8
    params = ConvParams((3, 3), (1, 1, 1), (1,) * 4, (1,) * 4, (1,) * 4, 1, (6, 5, 5), rule="aligned")
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=torch.channels_last_3d)
    x[..., -cut:, -cut:, -cut:] = torch.randn(1, 16, cut, cut, cut)
    w = torch.randn(16, 16, 3, 3).to(x)
    corner = x[..., -cut:, -cut:, -cut:].contiguous()
    for function in (gather_gemm.conv, lambda x, w, b, g: gather_gemm.input_grad(x, w, g)):
        y = function(x, w, None, params.geometry(x.shape[2:]))[..., 1 - cut :, 1 - cut :, 1 - cut :]
        expected = function(corner, w, None, params.geometry(corner.shape[2:]))[..., 1:, 1:, 1:]
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_tables_cover_every_product_once():
    """Forward and input gradient name the same (output, tap, input) triples, those of the definition."""
    for case in CASES:
        geometry = case.geometry
        expected = set()
        for view in {region.view for region in gather_tables.regions(geometry, case.out_channels)}:
            for number, tap in enumerate(geometry.taps(view)):
                for y in itertools.product(*map(range, geometry.output_size)):
                    x = tuple(i * s + t for i, s, t in zip(y, geometry.stride, tap, strict=True))
                    if all(0 <= i < n for i, n in zip(x, geometry.input_size, strict=True)):
                        expected.add((view, number, y, x))
        found = set()
        for parity, count in gather_tables.parities(geometry):
            for view in {region.view for region in gather_tables.regions(geometry, case.out_channels)}:
                for number, offset in gather_tables.parity_taps(geometry, view, parity):
                    for q in itertools.product(*map(range, count)):
                        y = tuple(i + o for i, o in zip(q, offset, strict=True))
                        x = tuple(i * s + r for i, s, r in zip(q, geometry.stride, parity, strict=True))
                        if all(0 <= i < n for i, n in zip(y, geometry.output_size, strict=True)):
                            found.add((view, number, y, x))
        assert found == expected, case
