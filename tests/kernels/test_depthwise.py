import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from acs_triton.geometry import PLANE_AXES, ConvParams, default_split
from acs_triton.kernels import depthwise, depthwise_plan
from acs_triton.kernels.partials import splits
from acs_triton.layout import memory_format

from . import oracle
from .cases import LAYOUTS, random_cases


def geometry(size, channels, kernel=(3, 3), stride=(1, 1, 1), low=None, high=None, dilation=1, split=None, **rest):
    """``low`` and ``high``: padding of the roles ``(D, H as u, H as v, W)``; ``channels``: (in, out), or both."""
    ku, kv = kernel
    groups, out = channels if isinstance(channels, tuple) else (channels, channels)
    low = low or (dilation * (ku // 2),) * 2 + (dilation * (kv // 2),) * 2
    params = ConvParams(
        kernel,
        stride,
        low,
        high or low,
        (dilation,) * 4,
        groups,
        split or default_split(out),
        **{"rule": "acsconv", **rest},
    )
    return params.geometry(size), out


CASES = {
    "odd sizes": geometry((3, 2, 7), 24),
    "few channels": geometry((3, 2, 5), 3),
    "two channels, an empty view": geometry((4, 5, 3), 2),
    "one view only": geometry((3, 5, 4), 8, split=(0, 8, 0)),
    "sizes of 1": geometry((1, 1, 1), 8),
    "depth of 1": geometry((1, 6, 5), 2),
    "several windows": geometry((2, 3, 4), 72, split=(9, 40, 23)),
    "1x1": geometry((3, 4, 5), 8, (1, 1)),
    "even kernel": geometry((5, 4, 3), 8, (2, 2), low=(1, 1, 1, 1), high=(0, 0, 0, 0)),
    "4x4, stride 2": geometry((4, 3, 6), 3, (4, 4), (2, 2, 2), low=(1, 1, 1, 1)),
    "5x5": geometry((5, 6, 3), 1, (5, 5), split=(0, 1, 0)),
    "5x5, stride 2": geometry((5, 4, 3), 2, (5, 5), (2, 2, 2)),
    "7x7": geometry((2, 3, 5), 2, (7, 7)),
    "not square": geometry((4, 3, 5), 3, (3, 5)),
    "stride 2": geometry((7, 3, 5), 3, stride=(2, 2, 2)),
    "stride 3": geometry((4, 5, 3), 2, stride=(3, 3, 3)),
    "stride beyond the kernel": geometry((5, 2, 6), 3, (2, 2), (3, 1, 3), low=(0, 0, 0, 0)),
    "mixed strides": geometry((3, 4, 5), 8, stride=(1, 2, 3)),
    "dilation": geometry((4, 3, 5), 8, dilation=2),
    "dilation and stride": geometry((5, 4, 6), 2, stride=(2, 2, 2), dilation=2),
    "no padding": geometry((5, 4, 3), 8, low=(0, 0, 0, 0)),
    "padding on one side": geometry((4, 3, 5), 8, low=(2, 2, 2, 2), high=(0, 0, 0, 0)),
    "aligned": geometry((5, 4, 3), 3, stride=(2, 2, 1), rule="aligned"),
    "planar": geometry((4, 3, 5), 8, split=(8, 0, 0), rule="planar", low=(0, 1, 1, 1)),
    "multiplier 2": geometry((4, 3, 2), (5, 10)),
}


def operands(make, case, dtype, format, batch=1):
    where, out = CASES[case] if isinstance(case, str) else case
    input = make((batch, where.groups, *where.input_size), dtype, 0, format)
    weight = make((out, 1, *where.kernel_size), dtype, 1)
    bias = make((out,), dtype, 2)
    grad_output = make((batch, out, *where.output_size), dtype, 3, format)
    return where, input, weight, bias, grad_output


def check_conv(input, weight, bias, where):
    result = depthwise.conv(input, weight, bias, where)
    magnitude = oracle.conv(input.abs(), weight.abs(), oracle.absolute(bias), where)
    oracle.check(result, oracle.conv(input, weight, bias, where), magnitude, weight[0].numel() + 1, exact=True)
    assert result.dtype == input.dtype
    assert memory_format(result) == memory_format(input) or min(result.shape) == 1


def check_input_grad(grad_output, weight, where):
    result = depthwise.input_grad(grad_output, weight, where)
    magnitude = oracle.input_grad(grad_output.abs(), weight.abs(), where)
    oracle.check(result, oracle.input_grad(grad_output, weight, where), magnitude, weight[0].numel(), exact=True)
    assert memory_format(result) == memory_format(grad_output) or min(result.shape) == 1


def check_weight_grad(grad_output, input, where):
    result = depthwise.weight_grad(grad_output, input, where)
    magnitude = oracle.weight_grad(grad_output.abs(), input.abs(), where)
    terms = grad_output[:, 0].numel()
    oracle.check(result, oracle.weight_grad(grad_output, input, where), magnitude, terms, exact=True)
    assert result.is_contiguous()


def check_all(where, input, weight, bias, grad_output):
    check_conv(input, weight, bias, where)
    check_input_grad(grad_output, weight, where)
    check_weight_grad(grad_output, input, where)


@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(device, make, case):
    # The two layouts differ in tiles and vectors, not in geometry: some cases in both are enough.
    both = case in ("few channels", "stride 2")
    formats = LAYOUTS.values() if both else [torch.channels_last_3d]
    for format in formats:
        check_all(*operands(make, case, torch.float32, format))


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_cases("depthwise"))
def test_random_configurations(case, device, make):
    operand = (case.geometry, case.out_channels)
    check_all(*operands(make, operand, torch.float32, LAYOUTS[case.layout], case.batch))


@pytest.mark.parametrize("format", LAYOUTS)
def test_dtypes(make, dtype, format):
    check_all(*operands(make, "odd sizes", dtype, LAYOUTS[format]))


@pytest.mark.parametrize("format", LAYOUTS)
def test_multiplier_rounds_once(make, device, format):
    where, _, weight, _, grad_output = operands(make, "multiplier 2", torch.float16, LAYOUTS[format])
    check_input_grad(grad_output, weight, where)


def test_no_bias(device, make):
    where, input, weight, _, _ = operands(make, "few channels", torch.float32, torch.channels_last_3d)
    check_conv(input, weight, None, where)


def test_empty_batch(device, make):
    where, input, weight, bias, grad_output = operands(
        make, "odd sizes", torch.float32, torch.contiguous_format, batch=0
    )
    assert depthwise.conv(input, weight, bias, where).shape == grad_output.shape
    assert depthwise.input_grad(grad_output, weight, where).shape == input.shape
    assert torch.equal(depthwise.weight_grad(grad_output, input, where), torch.zeros_like(weight))


@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("format", LAYOUTS)
def test_slices(device, make, format, shift):
    """A slice of NaN in every direction: what lies beside it must not be read into a result."""
    where, input, weight, bias, grad_output = operands(make, "even kernel", torch.float16, LAYOUTS[format])

    def inside_nan(values):
        sizes = [size + extra for size, extra in zip(values.shape, (1, 16, 1, 2, 3), strict=True)]
        wide = make(sizes, values.dtype, 4, LAYOUTS[format]).fill_(torch.nan)
        window = wide[:-1, shift : shift + values.shape[1], 1:, 1:-1, :-3]
        return window.copy_(values)

    check_all(where, inside_nan(input), weight, bias, inside_nan(grad_output))


def test_expanded_and_unaligned(device, make):
    where, out = CASES["odd sizes"]
    expanded = make((1, out, *where.input_size), torch.float32).expand(2, -1, -1, -1, -1)
    weight, bias = make((out, 1, 3, 3), torch.float32, 1), make((out,), torch.float32, 2)
    grad_output = make((2, 1, 1, 1, 1), torch.float32, 3).expand(2, out, *where.output_size)
    check_all(where, expanded, weight, bias, grad_output)
    unaligned = make((2, out, *where.input_size), torch.float32, 4, torch.channels_last_3d, offset=1)
    check_conv(unaligned, weight, bias, where)


@pytest.mark.parametrize("case", ["odd sizes", "stride 2", "dilation", "depth of 1"])
def test_infinite_values_stay_in_their_receptive_field(device, make, case):
    where, input, weight, _, grad_output = operands(make, case, torch.float32, torch.channels_last_3d, batch=1)
    ones = torch.ones_like(weight)
    for values, run, reach in (
        (input, lambda x: depthwise.conv(x, weight, None, where), lambda x: oracle.conv(x, ones, None, where)),
        (grad_output, lambda g: depthwise.input_grad(g, weight, where), lambda g: oracle.input_grad(g, ones, where)),
        (
            input,
            lambda x: depthwise.weight_grad(grad_output, x, where),
            lambda x: oracle.weight_grad(torch.ones_like(grad_output), x, where),
        ),
    ):
        touched = torch.zeros_like(values)
        touched[0, values.shape[1] // 2, -1, -1, -1] = 1
        touched[0, -1, 0, values.shape[3] // 2, 0] = 1
        result = run(values.masked_fill(touched == 1, torch.inf))
        assert torch.equal(result.isfinite().cpu(), reach(touched).cpu() == 0)


@pytest.mark.parametrize("format", LAYOUTS)
def test_weight_grad_repeats_bit_by_bit(device, make, monkeypatch, format):
    where, input, _, _, grad_output = operands(make, geometry((5, 4, 3), 2), torch.float32, LAYOUTS[format])
    cut = []

    def splits(*facts):
        # Few boxes are enough for one program; this test is about several.
        cut.append((1, facts[1]))
        return cut[-1]

    monkeypatch.setattr(depthwise, "splits", splits)
    first = depthwise.weight_grad(grad_output, input, where)
    assert torch.equal(first, depthwise.weight_grad(grad_output, input, where))
    assert all(cuts > 1 for _, cuts in cut)
    check_weight_grad(grad_output, input, where)


def test_offsets_of_64_bits(device, make, monkeypatch):
    monkeypatch.setattr(depthwise, "needs_int64", lambda *tensors: True)
    for format in LAYOUTS.values():
        check_all(*operands(make, "stride 2", torch.float32, format))


def test_a_second_call_copies_no_table(device, make):
    operand = operands(make, "several windows", torch.float32, torch.channels_last_3d)
    where, input, weight, bias, grad_output = operand
    for _ in range(2):
        before = depthwise._table.cache_info().misses
        depthwise.conv(input, weight, bias, where)
        depthwise.weight_grad(grad_output, input, where)
    assert depthwise._table.cache_info().misses == before


def test_suits():
    where, _ = CASES["odd sizes"]
    assert depthwise.suits(where, 24, 24)
    assert depthwise.suits(CASES["multiplier 2"][0], 5, 10)
    assert not depthwise.suits(where, 48, 48), "two channels a group"
    assert not depthwise.suits(geometry((9, 9, 9), 8, (8, 8))[0], 8, 8), "64 taps"
    assert not depthwise.suits(geometry((5, 5, 5), (1, 16))[0], 1, 16), "one channel in, many out"


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_parity_classes_share_out_the_taps(stride):
    """Every tap of every output position appears in exactly one class, at the input position that it read."""
    for dilation, taps, start in itertools.product((1, 2, 3), (1, 2, 5), (-2, 0, 1)):
        found = []
        for residue in range(stride):
            part = depthwise_plan._class_taps(residue, stride, start, dilation, taps)
            for q, i in itertools.product(range(-20, 20), range(part.count)):
                found.append((q * stride + residue, part.first - i * part.step, q + part.base + i * part.delta))
        assert len(set(found)) == len(found)
        assert {(o * stride + start + t * dilation, t, o) for o in range(-5, 5) for t in range(taps)} <= set(found)
        assert all(position == o * stride + start + t * dilation for position, t, o in found)


def test_windows_cover_each_channel_once():
    for split in ((22, 21, 21), (9, 40, 23), (0, 5, 2), (1, 0, 0)):
        where, out = geometry((4, 4, 4), sum(split), split=split)
        for vector, channels in ((1, 16), (8, 8), (8, 32)):
            owners = []
            for record in depthwise_plan.conv_programs(where, vector, channels).records:
                axis, window, first, end = record[:4]
                assert window % vector == 0
                view = where.views[[span[1:] for span in where.views].index((first, end))][0]
                assert axis == PLANE_AXES[view][0]
                owners += range(max(window, first), min(window + channels, end))
            assert sorted(owners) == list(range(out))


def test_tiles():
    sizes = [(1, 7, 9), (2, 2, 2), (4, 8, 3), (5, 5, 5), (16, 16, 16), (64, 48, 64), (1, 1, 1), (33, 6, 130)]
    for taps, channels_last, stride in itertools.product((1, 4, 9, 25, 49), (True, False), (1, 2, 3)):
        convs = depthwise_plan.all_tiles("conv", taps, channels_last, stride)
        assert set(convs) == {depthwise_plan.conv_tile(size, channels_last, stride) for size in sizes}
        grads = depthwise_plan.all_tiles("weight_grad", taps, channels_last, stride)
        assert grads == (depthwise_plan.weight_grad_tile(channels_last, taps),)
        for tile in convs + grads:
            assert tile.num_warps == 4
            assert tile.rows * tile.width * tile.channels in (128, 256, 512), "up to four elements a thread"
    with pytest.raises(ValueError, match="kernel='stem'"):
        depthwise_plan.all_tiles("stem", 9, True, 1)


def test_workspace_stays_below_its_limit():
    for programs, boxes, outputs in (
        (1, 10**7, 9),
        (40, 10**6, 4096 * 49),
        (3, 1, 9),
        (500, 100, 10**6),
        (9, 10**7, 64 * 147),
    ):
        each, cuts = splits(programs, boxes, outputs, 200)
        assert each * cuts >= boxes > each * (cuts - 1)
        assert cuts == 1 or cuts * outputs * 4 <= 64 << 20
