import pytest
import torch
from hypothesis import HealthCheck, given, settings

from acs_triton.geometry import ConvParams, default_split
from acs_triton.kernels import device as triton_device
from acs_triton.kernels import stem, stem_plan
from acs_triton.layout import memory_format

from . import oracle
from .cases import LAYOUTS, random_cases


def geometry(size, out, kernel=(3, 3), stride=(1, 1, 1), low=None, high=None, dilation=1, split=None, rule="acsconv"):
    """``low`` and ``high``: padding of the roles ``(D, H as u, H as v, W)``."""
    ku, kv = kernel
    low = low or (dilation * (ku // 2),) * 2 + (dilation * (kv // 2),) * 2
    params = ConvParams(kernel, stride, low, high or low, (dilation,) * 4, 1, split or default_split(out), rule)
    return params.geometry(size)


CASES = {
    "three channels": (3, geometry((5, 6, 7), 16)),
    "one channel": (1, geometry((4, 3, 5), 8)),
    "two channels": (2, geometry((3, 5, 4), 7)),
    "four channels": (4, geometry((2, 3, 9), 5)),
    "7x7, stride 2": (3, geometry((7, 6, 9), 24, (7, 7), (2, 2, 2))),
    "several column tiles": (1, geometry((3, 4, 5), 150, split=(70, 0, 80))),
    "columns of 32": (2, geometry((3, 4, 5), 60, split=(30, 20, 10))),
    "sizes of 1": (3, geometry((1, 1, 1), 6)),
    "one output": (1, geometry((4, 1, 6), 1)),
    "1x1": (4, geometry((3, 4, 5), 6, (1, 1))),
    "even kernel": (3, geometry((5, 6, 4), 6, (2, 2), low=(1, 1, 1, 1), high=(0, 0, 0, 0))),
    "not square": (2, geometry((5, 6, 7), 6, (5, 3))),
    "stride 3": (3, geometry((7, 5, 8), 6, stride=(3, 3, 3))),
    "mixed strides": (3, geometry((5, 6, 7), 6, stride=(1, 2, 3))),
    "dilation": (3, geometry((6, 5, 7), 6, dilation=2)),
    "no padding": (3, geometry((5, 6, 4), 6, low=(0, 0, 0, 0))),
    "padding on one side": (3, geometry((4, 5, 6), 6, low=(2, 2, 2, 2), high=(0, 0, 0, 0))),
    "aligned": (3, geometry((5, 4, 6), 6, stride=(2, 2, 2), rule="aligned")),
    "planar": (3, geometry((4, 6, 5), 6, split=(6, 0, 0), rule="planar", low=(0, 1, 1, 1))),
}


def operands(make, case, dtype, format, batch=2):
    channels, where = CASES[case] if isinstance(case, str) else case
    out = sum(where.split)
    input = make((batch, channels, *where.input_size), dtype, 0, format)
    weight = make((out, channels, *where.kernel_size), dtype, 1)
    bias = make((out,), dtype, 2)
    grad_output = make((batch, out, *where.output_size), dtype, 3, format)
    return where, input, weight, bias, grad_output


def exact(dtype):
    return dtype != torch.float32 or triton_device.dot_precision(dtype) != "tf32" or triton_device.INTERPRETED


def check_conv(input, weight, bias, where):
    result = stem.conv(input, weight, bias, where)
    magnitude = oracle.conv(input.abs(), weight.abs(), oracle.absolute(bias), where)
    expected = oracle.conv(input, weight, bias, where)
    oracle.check(result, expected, magnitude, weight[0].numel() + 1, exact(input.dtype))
    assert result.dtype == input.dtype
    assert memory_format(result) == memory_format(input) or 1 in result.shape


def check_weight_grad(grad_output, input, where):
    result = stem.weight_grad(grad_output, input, where)
    magnitude = oracle.weight_grad(grad_output.abs(), input.abs(), where)
    expected = oracle.weight_grad(grad_output, input, where)
    oracle.check(result, expected, magnitude, grad_output[:, 0].numel(), exact(input.dtype))
    assert result.is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(device, make, case):
    # Formats differ in strides, not in geometry: one case in both is enough.
    for format in LAYOUTS.values() if case == "several column tiles" else [torch.contiguous_format]:
        where, input, weight, bias, grad_output = operands(make, case, torch.float32, format)
        check_conv(input, weight, bias, where)
        check_weight_grad(grad_output, input, where)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_cases("stem"))
def test_random_configurations(case, device, make):
    operand = (case.in_channels, case.geometry)
    where, input, weight, bias, grad_output = operands(make, operand, torch.float32, LAYOUTS[case.layout], case.batch)
    check_conv(input, weight, bias, where)
    check_weight_grad(grad_output, input, where)


@pytest.mark.parametrize("format", LAYOUTS)
def test_dtypes(make, dtype, format):
    where, input, weight, bias, grad_output = operands(make, "7x7, stride 2", dtype, LAYOUTS[format], batch=1)
    check_conv(input, weight, bias, where)
    check_weight_grad(grad_output, input, where)


def test_exact_float32(device, make):
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        where, input, weight, bias, grad_output = operands(make, "one channel", torch.float32, torch.contiguous_format)
        assert exact(torch.float32)
        check_conv(input, weight, bias, where)
        check_weight_grad(grad_output, input, where)
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision


def test_no_bias(device, make):
    where, input, weight, _, _ = operands(make, "one channel", torch.float32, torch.contiguous_format)
    check_conv(input, weight, None, where)


def test_empty_batch(device, make):
    operand = operands(make, "one channel", torch.float32, torch.contiguous_format, batch=0)
    where, input, weight, bias, grad_output = operand
    assert stem.conv(input, weight, bias, where).shape == grad_output.shape
    assert torch.equal(stem.weight_grad(grad_output, input, where), torch.zeros_like(weight))


def test_slices_and_expanded(device, make):
    """Slices of NaN: what lies beside them must not be read into a result."""
    where, input, weight, bias, grad_output = operands(make, "even kernel", torch.float16, torch.contiguous_format)

    def inside_nan(values, format):
        sizes = [size + extra for size, extra in zip(values.shape, (1, 2, 1, 2, 3), strict=True)]
        wide = make(sizes, values.dtype, 4, format).fill_(torch.nan)
        return wide[:-1, 1:-1, 1:, 1:-1, :-3].copy_(values)

    for format in LAYOUTS.values():
        check_conv(inside_nan(input, format), weight, bias, where)
        check_weight_grad(inside_nan(grad_output, format), inside_nan(input, format), where)
    # The input in one layout, the gradient in the other, and one value expanded everywhere.
    check_weight_grad(inside_nan(grad_output, torch.channels_last_3d), input, where)
    check_weight_grad(grad_output[:1, :1, :1, :1, :1].expand_as(grad_output), input[:1].expand_as(input), where)


@pytest.mark.parametrize("case", ["three channels", "7x7, stride 2", "dilation"])
def test_infinite_values_stay_in_their_receptive_field(device, make, case):
    where, input, weight, _, grad_output = operands(make, case, torch.float32, torch.contiguous_format, batch=1)
    touched = torch.zeros_like(input)
    touched[0, -1, -1, -1, -1] = 1
    infinite = input.masked_fill(touched == 1, torch.inf)
    result = stem.conv(infinite, weight, None, where)
    assert torch.equal(result.isfinite().cpu(), oracle.conv(touched, torch.ones_like(weight), None, where) == 0)
    result = stem.weight_grad(grad_output, infinite, where)
    assert torch.equal(result.isfinite().cpu(), oracle.weight_grad(torch.ones_like(grad_output), touched, where) == 0)


def test_weight_grad_repeats_bit_by_bit(device, make, monkeypatch):
    where, input, _, _, grad_output = operands(make, "mixed strides", torch.float32, torch.contiguous_format)
    cut = []

    def splits(*facts):
        # Few positions are enough for one program; this test is about several.
        cut.append((1, facts[1]))
        return cut[-1]

    monkeypatch.setattr(stem, "splits", splits)
    first = stem.weight_grad(grad_output, input, where)
    assert torch.equal(first, stem.weight_grad(grad_output, input, where))
    assert all(cuts > 1 for _, cuts in cut)
    check_weight_grad(grad_output, input, where)


def test_offsets_of_64_bits(device, make, monkeypatch):
    monkeypatch.setattr(stem, "needs_int64", lambda *tensors: True)
    for format in LAYOUTS.values():
        where, input, weight, bias, grad_output = operands(make, "mixed strides", torch.float32, format)
        check_conv(input, weight, bias, where)
        check_weight_grad(grad_output, input, where)


def test_a_second_call_copies_no_table(device, make):
    where, input, weight, bias, grad_output = operands(make, "two channels", torch.float32, torch.contiguous_format)
    for _ in range(2):
        before = stem._tables.cache_info().misses
        stem.conv(input, weight, bias, where)
        stem.weight_grad(grad_output, input, where)
    assert stem._tables.cache_info().misses == before


def test_suits():
    assert stem.suits(geometry((5, 5, 5), 16), 3, 16)
    assert not stem.suits(geometry((5, 5, 5), 16), 5, 16), "five channels"
    assert not stem.suits(geometry((32, 32, 32), 16, (11, 11)), 3, 16), "more taps than bits"


def test_pairs_follow_the_weight():
    """The table lists the pairs in the weight's memory order, with the element and the bits of each."""
    where = geometry((9, 9, 9), 6, (2, 3), low=(1, 1, 2, 2), dilation=2)
    strides = (1000000, 10000, 100, 1)
    tile = stem_plan.conv_tile(2, 2)
    plan = stem_plan.plan(where, 2, strides, tile)
    assert plan.depth == 32
    assert len(plan.pairs[0]) == 32
    for view, row in enumerate(plan.pairs):
        extent = where.extent(view)
        for number, pair in enumerate(row):
            offset, bits = divmod(pair, 1 << stem_plan.NEED_BITS)
            if number >= 2 * 6:
                assert (offset, bits) == (0, stem_plan.NEVER)
                continue
            channel, tap = divmod(number, 6)
            taps = [0, 0, 0]
            axes = [axis for axis in range(3) if axis != view]
            taps[axes[0]], taps[axes[1]] = divmod(tap, 3)
            steps = [tap * 2 * stride for tap, stride in zip(taps, strides[1:], strict=True)]
            assert offset == channel * strides[0] + sum(steps)
            assert bits == sum(1 << (sum(extent[:axis]) + taps[axis]) for axis in range(3))


def test_boxes_cover_the_output():
    for size in ((1, 1, 1), (7, 5, 3), (64, 64, 64), (1, 33, 17), (100, 1, 1)):
        for positions in (32, 64, 128, 256):
            counts, (log_h, log_w) = stem_plan.box(size, positions)
            edges = (positions >> (log_h + log_w), 1 << log_h, 1 << log_w)
            assert edges[0] >= 1
            assert all((n - 1) * edge < length <= n * edge for n, edge, length in zip(counts, edges, size, strict=True))


def test_tiles():
    for itemsize in (2, 4, 8):
        for kernel in ("conv", "weight_grad"):
            tiles = stem_plan.all_tiles(kernel, itemsize)
            assert len(set(tiles)) == 2
            assert all(tile.num_warps <= 4 for tile in tiles)
            assert all(getattr(stem_plan, f"{kernel}_tile")(n, itemsize) in tiles for n in (1, 16, 17, 22, 33, 400))
    with pytest.raises(ValueError, match="kernel='depthwise'"):
        stem_plan.all_tiles("depthwise", 2)
