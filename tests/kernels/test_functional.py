"""The public functions through the Triton backend: which kernels they reach, and derivatives of derivatives."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import acs_triton.functional as ours
from acs_triton import explain, use_backend
from acs_triton.kernels import gather_gemm

from . import oracle

FAMILIES = {
    "gather_gemm": ((1, 5, 2, 3, 2), (3, 5, 3, 3), {"padding": 1}),
    "gather_gemm, strided groups": ((1, 4, 3, 4, 2), (4, 2, 2, 2), {"stride": 2, "groups": 2}),
    "depthwise": ((1, 2, 3, 2, 2), (2, 1, 2, 2), {"groups": 2}),
    "stem": ((1, 2, 3, 2, 3), (3, 2, 2, 2), {}),
}


def operands(family, dtype, device):
    input, weight, options = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator) for shape in (input, weight, weight[:1]))
    return [t.to(device.torch_device, dtype).requires_grad_() for t in tensors], options


@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives(family, device):
    """First and second derivatives are those of the function that is computed."""
    if not device.interpreted:
        pytest.skip("float64 kernels run in the interpreter only")
    inputs, options = operands(family, torch.float64, device)
    with use_backend("triton"):
        assert family.split(",")[0] in explain(*inputs, **options)
        assert gradcheck(lambda *tensors: ours.acs_conv3d(*tensors, **options), inputs, fast_mode=True)
        assert gradgradcheck(lambda *tensors: ours.acs_conv3d(*tensors, **options), inputs, fast_mode=True)


def test_derivatives_of_mixed_views(device):
    """With respect to the view weights too."""
    if not device.interpreted:
        pytest.skip("float64 kernels run in the interpreter only")
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 2, 3, 2), (3, 5, 2, 2), (3, 3), (3,)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    with use_backend("triton"):
        assert explain(*inputs[:2], soft=True).count("merged=True") == 3
        assert gradcheck(ours.soft_acs_conv3d, inputs, fast_mode=True)
        assert gradgradcheck(ours.soft_acs_conv3d, inputs, fast_mode=True)


@pytest.mark.parametrize("dilation", [1, 2])
def test_mixed_views_are_one_launch(dilation, device, monkeypatch):
    """On one grid of taps and, with a dilation in the published rule, off it."""
    launches, launch = [], gather_gemm._launch
    monkeypatch.setattr(gather_gemm, "_launch", lambda *args: launches.append(args) or launch(*args))
    x, w, shares = (torch.ones(shape, device=device.torch_device) for shape in ((1, 8, 3, 3, 3), (6, 8, 3, 3), (6, 3)))
    with use_backend("triton"):
        y = ours.soft_acs_conv3d(x, w, shares, padding=dilation, dilation=dilation)
    assert len(launches) == 1
    assert (y[0, :, 1, 1, 1] == (27 if dilation == 1 else 3) * 8).all()


def test_mixed_views_with_more_tap_positions_than_the_kernel_tells_apart(device):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 8, 2, 2, 2), (3, 8, 11, 11), (3, 3)
    x, w, shares = (torch.randn(shape, generator=generator).to(device.torch_device) for shape in shapes)
    with use_backend("triton"):
        plan = explain(x, w, padding=5, soft=True).splitlines()[0]
        found = ours.soft_acs_conv3d(x, w, shares, padding=5)
    assert "view by view" in plan or "descriptor" in plan
    with use_backend("torch"):
        expected = ours.soft_acs_conv3d(x.double(), w.double(), shares.double(), padding=5)
    assert (found - expected).norm() <= oracle.RELATIVE_ERROR[torch.float32] * expected.norm()


def with_gradients(function, tensors, dtype, where):
    tensors = [t.detach().to(where, dtype).requires_grad_() for t in tensors]
    result = function(*tensors)
    grads = torch.autograd.grad(result, tensors, torch.ones_like(result) + result.detach())
    return [t.detach().cpu().double() for t in (result, *grads)]


@pytest.mark.parametrize("function", ["soft", "mean", "2.5D", "soft depthwise", "soft stem"])
def test_mixed_views_and_slices(function, device):
    """Soft ACS and 2.5D convolution, and their gradients, against the torch backend in float64."""
    call = {
        "soft": lambda x, w, share: ours.soft_acs_conv3d(x, w, share, padding=1),
        "mean": lambda x, w, share: ours.soft_acs_conv3d(x, w, torch.full_like(share, 1 / 3), padding=1) * share.sum(),
        "2.5D": lambda x, w, share: ours.conv2_5d(x, w, share[:, 0], padding=1),
        "soft depthwise": lambda x, w, share: ours.soft_acs_conv3d(x, w[:5, :1], share[:5], padding=1, groups=5),
        "soft stem": lambda x, w, share: ours.soft_acs_conv3d(x[:, :2], w[:, :2], share, padding=1),
    }[function]
    dtype = torch.float32 if device.interpreted else torch.float16
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 3, 4, 3), (6, 5, 3, 3), (6, 3)
    # Halves of small integers, which every dtype holds exactly.
    tensors = [torch.randint(-4, 5, shape, generator=generator) / 2 for shape in shapes]
    with use_backend("triton"):
        found = with_gradients(call, tensors, dtype, device.torch_device)
    with use_backend("torch"):
        expected = with_gradients(call, tensors, torch.float64, "cpu")
    for actual, right in zip(found, expected, strict=True):
        assert (actual - right).norm() <= oracle.RELATIVE_ERROR[dtype] * right.norm()


def beyond_32_bits(shape, dtype):
    """Channels-last values of which each next slice along D lies 2**30 elements further: the third is beyond 2**31."""
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    try:
        # Memory that nobody touches costs nothing.
        memory = torch.empty(2**31 + 2**16, dtype=dtype)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    _, channels, _, height, width = shape
    far = memory.as_strided(shape, (0, 1, 2**30, 8 * 40 * width, 8 * 40))
    assert channels <= 8 * 40
    assert (height * width) * 8 * 40 <= 2**16
    return far.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("family", ["gather_gemm", "depthwise", "stem"])
def test_samples_beyond_32_bits(family, device):
    """Offsets within one sample that 32 bits do not hold, in the convolution and the weight gradient."""
    if not device.interpreted:
        pytest.skip("the interpreter shares its memory with the host")
    channels = {"gather_gemm": 8, "depthwise": 8, "stem": 3}[family]
    groups = 8 if family == "depthwise" else 1
    x = beyond_32_bits((1, channels, 3, 3, 3), torch.float16)
    weight = torch.randn(8, channels // groups, 3, 3).half().requires_grad_()
    near = x.contiguous()
    grads, results = [], []
    with use_backend("triton"):
        for input in (x, near):
            results.append(ours.acs_conv3d(input, weight, padding=1, groups=groups))
            grads.append(torch.autograd.grad(results[-1].sum(), weight)[0])
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(*grads, rtol=2e-3, atol=2e-2)
