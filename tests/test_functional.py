"""The functions against the written-out definition, float64 unless the dtype is the subject."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import acs_triton.functional as ours
import reference
from acs_triton.backends import cpu_cost
from tests.strategies import acs_arguments

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def gradients(output, leaves, grad):
    # A result whose samples all lie outside the input does not depend on it.
    return torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)


def assert_same(call, operands):
    """Output and gradients of ``call(library, *operands)`` are the reference's."""
    copies = [one.detach().double().requires_grad_() for one in operands]
    leaves = [one.detach().requires_grad_() for one in operands]
    result, expected = call(ours, *leaves), call(reference, *copies)
    assert result.shape == expected.shape
    assert result.dtype == operands[0].dtype
    grad = torch.randn_like(expected)
    pairs = zip(
        (result, *gradients(result, leaves, grad.to(result.dtype))),
        (expected, *gradients(expected, copies, grad)),
        strict=True,
    )
    tolerance = TOLERANCE[result.dtype]
    for found, wanted in pairs:
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * (1 + scale))
    return result


def operands_of(case):
    torch.manual_seed(0)
    x, weight = randn(*case["shape"]), randn(*case["weight"])
    if case["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    return x, weight, randn(len(weight))


def skip_if_it_does_not_fit(case, **options):
    torch.manual_seed(0)
    try:
        ours.acs_conv3d(torch.empty(case["shape"]), torch.empty(case["weight"]), **case["options"], **options)
    except ValueError:
        assume(False)


@pytest.mark.fuzz
@given(acs_arguments())
def test_acs(case):
    skip_if_it_does_not_fit(case)
    for aligned in (False, True):
        assert_same(
            lambda m, x, w, b, aligned=aligned: m.acs_conv3d(
                x, w, b, split=case["split"], aligned=aligned, **case["options"]
            ),
            operands_of(case),
        )


@pytest.mark.fuzz
@given(acs_arguments(), st.sampled_from([1, 8, 24]))
def test_float32_of_many_channels(case, times):
    """By the forms that CPUs have for it, which depend on channels, sizes and memory formats."""
    (samples, channels, *size), (outputs, inputs, *kernel) = case["shape"], case["weight"]
    case |= {"shape": (samples, channels * times, *size), "weight": (outputs * times, inputs * times, *kernel)}
    skip_if_it_does_not_fit(case)
    operands = [one.float() for one in operands_of(case)]  # which keeps the memory format
    assert_same(lambda m, x, w, b: m.acs_conv3d(x, w, b, **case["options"]), operands)


@pytest.mark.fuzz
@given(acs_arguments())
def test_soft(case):
    skip_if_it_does_not_fit(case)
    shares = randn(case["weight"][0], 3)
    assert_same(lambda m, x, w, b, s: m.soft_acs_conv3d(x, w, s, b, **case["options"]), (*operands_of(case), shares))


@pytest.mark.parametrize("axis", [-3, -2, -1])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 0, 2, 3), (3, 2, 1, 6)])
def test_conv2_5d(axis, stride, padding, dilation, groups):
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "axis": axis}
    operands = randn(2, 6, 7, 8, 9), randn(12, 6 // groups, 3, 3), randn(12)
    assert_same(lambda m, x, w, b: m.conv2_5d(x, w, b, **options), operands)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 8])
def test_dtypes(dtype, stride, groups):
    x, weight, bias = randn(2, 8, 6, 7, 8), randn(16, 8 // groups, 3, 3), randn(16)
    assert_same(
        lambda m, x, w, b: m.acs_conv3d(x, w, b, stride=stride, padding=1, groups=groups),
        [one.to(dtype) for one in (x, weight, bias)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "groups"), [(3, 1), (3, 16), (5, 16), (7, 1)])
def test_volumes_no_larger_than_the_kernel(dtype, k, groups):
    # PyTorch's own weight gradient is wrong for many of these on CPUs.
    for size in ((2, 9, 9), (5, 6, 9), (9, 1, 4), (3, 1, 4)):
        for stride in (1, 2):
            x = randn(2, 16, *size).to(dtype).contiguous(memory_format=torch.channels_last_3d)
            operands = x, randn(16, 16 // groups, k, k).to(dtype), randn(16).to(dtype)
            options = {"stride": stride, "padding": k // 2, "groups": groups}
            assert_same(lambda m, x, w, b, options=options: m.acs_conv3d(x, w, b, **options), operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_slices", [True, False])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": (0, 2, 1)}, {"padding": 2, "dilation": 2}, {}])
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_gradient_with_operands_exchanged(monkeypatch, dtype, by_slices, options, groups):
    exchanges, choose = [], cpu_cost.exchanged

    def plan(*args, chosen=cpu_cost.plan):
        result = chosen(*args)
        return replace(result, sliced=(by_slices,) * len(result.sliced))

    monkeypatch.setattr(cpu_cost, "plan", plan)
    monkeypatch.setattr(cpu_cost, "_exchanged", cpu_cost._exchanged.__wrapped__)
    monkeypatch.setattr(cpu_cost, "_takes_onednn", lambda *_: True)  # it does with two threads
    monkeypatch.setattr(cpu_cost, "exchanged", lambda *args: exchanges.append(choose(*args)) or exchanges[-1])
    # One axis is as long as the dilated kernel.
    x = randn(2, 16 * groups, 20, 5, 24).to(dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = randn(18 * groups, 16, 3, 3).to(dtype).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    y = ours.acs_conv3d(x, weight, groups=groups, **options)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, weight, grad)
    (wanted,) = torch.autograd.grad(
        reference.acs_conv3d(x.double(), exact, groups=groups, **options), exact, grad.double()
    )
    assert any(exchanges)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * wanted.abs().max().item())


@pytest.mark.parametrize("padding", [0, 1, 2, 5])
def test_views_that_lie_wholly_outside(padding):
    # A 1-voxel axis with a large kernel: some through-plane samples miss the input altogether.
    operands = randn(1, 2, 1, 9, 9), randn(3, 2, 3, 3), randn(3)
    options = {"padding": (5, padding, padding), "stride": (1, 1, 1)}
    assert_same(lambda m, x, w, b: m.acs_conv3d(x, w, b, **options), operands)
    assert_same(lambda m, x, w, b: m.acs_conv3d(x, w, b, split=(3, 0, 0), **options), operands)


def test_unbatched_and_empty_batch():
    x, weight, bias = randn(3, 5, 6, 7), randn(4, 3, 3, 3).requires_grad_(), randn(4)
    batched = ours.acs_conv3d(x[None], weight, bias, padding=1)
    assert torch.equal(ours.acs_conv3d(x, weight, bias, padding=1), batched[0])
    shares = torch.softmax(randn(4, 3), 1)
    soft = ours.soft_acs_conv3d(x[None], weight, shares, bias, padding=1)
    assert torch.equal(ours.soft_acs_conv3d(x, weight, shares, bias, padding=1), soft[0])
    empty = ours.acs_conv3d(x.new_empty(0, 3, 5, 6, 7), weight, bias, padding=1)
    assert empty.shape == (0, 4, 5, 6, 7)
    (grad,) = torch.autograd.grad(empty.sum(), weight)
    assert torch.equal(grad, torch.zeros_like(weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {}, {"groups": 2, "padding": 1}])
def test_nan_and_inf_reach_their_receptive_field_only(value, options):
    groups = options.get("groups", 1)
    x, weight = randn(1, 4, 7, 7, 7), randn(6, 4 // groups, 3, 3)
    x[0, 1, 3, 4, 2] = value
    found = ours.acs_conv3d(x, weight, **options)
    # What a finite change of the same voxel moves is its receptive field.
    changed, plain = x.clone(), x.clone()
    changed[0, 1, 3, 4, 2], plain[0, 1, 3, 4, 2] = 1.0, 0.0
    ones = torch.ones_like(weight)
    reached = reference.acs_conv3d(changed, ones, **options) != reference.acs_conv3d(plain, ones, **options)
    assert torch.equal(~found.isfinite(), reached)


@pytest.mark.parametrize(("channels", "out_channels"), [(1, 1), (1, 4097), (4097, 1), (4097, 3)])
def test_one_channel_and_4097(channels, out_channels):
    operands = randn(1, channels, 3, 2, 4), randn(out_channels, channels, 3, 3), randn(out_channels)
    assert_same(lambda m, x, w, b: m.acs_conv3d(x, w, b, padding=1), operands)


def test_4097_depthwise_channels():
    x, weight, bias = randn(1, 4097, 3, 2, 4), randn(4097, 1, 3, 3), randn(4097)
    found = ours.acs_conv3d(x, weight, bias, padding=1, groups=4097)
    for channel, view in ((0, 0), (1365, 0), (1366, 1), (2731, 1), (2732, 2), (4096, 2)):
        one, split = slice(channel, channel + 1), tuple(int(v == view) for v in range(3))
        expected = reference.acs_conv3d(x[:, one], weight[one], bias[one], padding=1, split=split)
        torch.testing.assert_close(found[:, one], expected)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2}], ids=str)
def test_one_voxel(options):
    operands = randn(2, 3, 1, 1, 1), randn(4, 3, 3, 3), randn(4)
    assert_same(lambda m, x, w, b: m.acs_conv3d(x, w, b, **options), operands)
    assert_same(lambda m, x, w, b, s: m.soft_acs_conv3d(x, w, s, b, **options), (*operands, randn(4, 3)))


@pytest.mark.parametrize("library", [ours.acs_conv3d, ours.conv2_5d, ours.soft_acs_conv3d])
@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(library, groups):
    x, weight = randn(0, 4, 5, 6, 7).requires_grad_(), randn(8, 4 // groups, 3, 3).requires_grad_()
    shares = (torch.softmax(randn(8, 3), 1),) if library is ours.soft_acs_conv3d else ()
    y = library(x, weight, *shares, padding=1, stride=2, groups=groups)
    assert y.shape[:2] == (0, 8)
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros_like(weight))


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolutions_of_few_positions_are_products_of_matrices(bias):
    few, many = torch.randn(4, 24, 4, 4), torch.randn(24, 64, 24, 24)
    for images, out, products in (
        (few, 40, True),
        (many, 256, False),
        (few.double(), 40, False),
        (few[:, :1], 3, True),
    ):
        weight = torch.randn(out, images.shape[1], 1, 1, dtype=images.dtype, requires_grad=True)
        shift = torch.randn(out, dtype=images.dtype, requires_grad=True) if bias else None
        for format in (torch.channels_last, torch.contiguous_format):
            data = images.contiguous(memory_format=format).requires_grad_()
            y, expected = ours.pointwise(data, weight, shift, 1), torch.conv2d(data, weight, shift)
            flat = format == torch.channels_last or images.shape[1] == 1
            assert ("Permute" in y.grad_fn.name()) == (products and flat)
            torch.testing.assert_close(y, expected)
            if format == torch.channels_last:
                assert y.is_contiguous(memory_format=format)
            operands = [one for one in (data, weight, shift) if one is not None]
            g = torch.randn_like(expected)
            for one, other in zip(*(torch.autograd.grad(z, operands, g) for z in (y, expected)), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    grouped = torch.randn(24, 2, 1, 1)
    torch.testing.assert_close(ours.pointwise(few, grouped, None, 12), torch.conv2d(few, grouped, groups=12))
    weight, last = torch.randn(5, 24, 1, 1), few.contiguous(memory_format=torch.channels_last)
    mapped = torch.vmap(lambda x: ours.pointwise(x, weight, None, 1))(last[None])
    torch.testing.assert_close(mapped, torch.conv2d(few, weight)[None])
