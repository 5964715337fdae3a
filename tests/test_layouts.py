"""Strides of inputs, weights and gradients: the numbers do not depend on them, and nothing is copied needlessly."""

import math
import os
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import acs_triton.functional as ours
import reference
from acs_triton.layout import converted, memory_format, write
from acs_triton.operators import ACSConv

COPIES = ("clone", "copy_", "_to_copy", "contiguous", "constant_pad_nd", "resize_")


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)


VIEWS = {
    "channels": lambda x: x[:, 1:5],
    "every second plane": lambda x: x[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 4),
    "expanded channels": lambda x: x[:, :1].expand(-1, 4, -1, -1, -1),
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1, -1),
    "expanded volume": lambda x: x[:, :, :1, :1, :1].expand(-1, -1, 5, 6, 7),
    "channels last": channels_last,
    "part of channels last": lambda x: channels_last(x)[:, 2:6, :, 1:],
    "batch innermost": lambda x: x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
}


@pytest.mark.parametrize("of_grad", VIEWS)
@pytest.mark.parametrize("of_input", VIEWS)
def test_strides_of_input_and_gradient(of_input, of_grad):
    number = list(VIEWS).index(of_input) + list(VIEWS).index(of_grad)
    options = ({"padding": 1}, {"padding": 1, "stride": 2}, {})[number % 3]
    x = VIEWS[of_input](randn(2, 6, 7, 8, 9)).detach().requires_grad_()
    weight, bias = randn(4, x.shape[1], 3, 3).requires_grad_(), randn(4).requires_grad_()
    y, expected = ours.acs_conv3d(x, weight, bias, **options), reference.acs_conv3d(x, weight, bias, **options)
    torch.testing.assert_close(y, expected)
    # A gradient with the view's strides; it may overlap itself.
    strides = VIEWS[of_grad](randn(2, 6, 7, 8, 9)).stride()
    grad = randn(1 + sum((n - 1) * s for n, s in zip(y.shape, strides, strict=True))).as_strided(y.shape, strides)
    leaves = x, weight, bias
    found, wanted = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad.clone())
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "view",
    [
        channels_last,
        lambda w: w.transpose(2, 3),
        lambda w: w[:1].expand_as(w),
        lambda w: torch.stack((w, w), -1)[..., 0],
        lambda w: w.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    ],
    ids=["channels last", "transposed", "expanded", "every second", "permuted"],
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_strides_of_the_weight(view, groups):
    x, weight = randn(2, 6, 5, 6, 7).requires_grad_(), view(randn(6, 6 // groups, 3, 3)).detach().requires_grad_()
    found = ours.acs_conv3d(x, weight, padding=1, groups=groups)
    expected = reference.acs_conv3d(x, weight, padding=1, groups=groups)
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad(y.square().sum(), (x, weight)) for y in (found, expected))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two)


def test_a_network_in_channels_last():
    layer = ACSConv(4, 8, 3, padding=1)
    x = randn(2, 4, 5, 6, 7, dtype=torch.float32)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    y = layer(channels_last(x))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, expected)


def test_channels_last_stays_channels_last():
    x = channels_last(randn(2, 6, 5, 6, 7)).requires_grad_()
    for options in ({"padding": 1}, {"stride": 2}, {"padding": 1, "groups": 3}):
        weight = randn(9, 6 // options.get("groups", 1), 3, 3)
        y = ours.acs_conv3d(x, weight, **options)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.is_contiguous(memory_format=torch.channels_last_3d)
    assert ours.acs_conv3d(x.detach().contiguous(), weight, padding=1, groups=3).is_contiguous()


def test_memory_format_is_pytorchs():
    suggest = torch._prims_common.suggest_memory_format
    base = torch.empty(2, 6, 4, 5, 7)
    last = channels_last(base)
    for x in (base, last, last[:, 1:4], last[:, :, 1:], base[:, :1], base[..., :1], base.transpose(1, 4), last[:0]):
        if x.numel():
            assert memory_format(x) == suggest(x)
    # But for steps: two positions after the fifth of five planes, the next sample has begun.
    base = torch.empty(2, 6, 5, 5, 7)
    stepped = channels_last(base)[:, :, ::2, ::2, ::2]
    assert suggest(stepped) == torch.contiguous_format
    assert memory_format(stepped) == torch.channels_last_3d
    assert memory_format(base[:, :, ::2, ::2, ::2]) == torch.contiguous_format


class Copies(TorchDispatchMode):
    """Operators that copy or pad."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in COPIES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("of_input", VIEWS)
def test_the_layer_itself_copies_nothing(of_input):
    """Whatever the strides, tensors reach the operators, forward and backward, as they are.

    But for a gradient in plain memory of a channels-last result: the gradients before it would all be plain.
    """
    x = VIEWS[of_input](randn(2, 6, 7, 8, 9)).detach().requires_grad_()
    layer = ACSConv(x.shape[1], 4, 3, padding=1, dtype=torch.float64).to(memory_format=torch.channels_last)
    leaves = x, *layer.parameters()
    y = layer(x)
    with Copies() as copies:
        layer(x)
        torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    assert not copies.seen
    with Copies() as copies:
        (for_x, *_) = torch.autograd.grad(y, leaves, torch.ones(y.shape, dtype=y.dtype))
    assert memory_format(for_x) == memory_format(x)
    assert copies.seen == ({"clone": 1} if memory_format(x) == torch.channels_last_3d else {})


def copied(step):
    """Elements that PyTorch's operators copy, pad or fill while ``step`` runs, at any depth."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells every start and end on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    names = "aten::copy_", "aten::constant_pad_nd", "aten::fill_", "aten::zero_"
    return sum(math.prod(event.input_shapes[0]) for event in profiler.events() if event.name in names)


@pytest.mark.parametrize(
    ("layout", "size", "out_channels", "converted"),
    [
        (torch.contiguous_format, (2, 16, 12, 14, 13), 48, False),
        (torch.contiguous_format, (2, 16, 20, 20, 20), 15, True),
        (torch.channels_last_3d, (2, 16, 12, 14, 13), 24, False),
    ],
)
def test_volumes_are_not_copied_by_the_torch_backend(layout, size, out_channels, converted):
    """Forward writes the three parts into the result; backward cuts the gradient in three, for each operand.

    Where the parts' channels would leave half of each vector empty, backward converts each volume once.
    """
    layer = ACSConv(16, out_channels, 3, padding=1)
    x = randn(*size, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_()
    y = layer(x)
    grad, leaves = torch.randn_like(y), (x, *layer.parameters())
    weights = 8 * layer.weight.numel()  # kernels are reordered
    assert copied(lambda: layer(x)) <= y.numel() + weights
    conversions = grad.numel() + 2 * x.numel() if converted else 0
    found = copied(lambda: torch.autograd.grad(y, leaves, grad))
    assert conversions <= found <= conversions + 2 * grad.numel() + weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 5, 6), (2, 19, 16, 16, 17), (1, 96, 16, 16, 16), (2, 300, 5, 5, 4), (1, 1, 20, 20, 20), (0, 9, 4, 4, 4)],
)
def test_converted(shape, dtype):
    plain = torch.randn(shape, dtype=dtype)
    last = plain.contiguous(memory_format=torch.channels_last_3d)
    for tensor in (plain, last, plain.transpose(3, 4), plain[:, : shape[1] // 2], last[:, : shape[1] // 2]):
        for format in (torch.contiguous_format, torch.channels_last_3d):
            found = converted(tensor, format)
            assert torch.equal(found, tensor)
            assert found.is_contiguous(memory_format=format)
    assert converted(plain, torch.contiguous_format) is plain


def test_written_channels_last():
    """Few channels at a time, to a part of a tensor and from planes that lie apart."""
    source = torch.randn(2, 21, 18, 17, 16)
    target = torch.full((2, 18, 17, 16, 30), float("nan")).movedim(-1, 1)
    write(target[:, 4:25], source)
    assert torch.equal(target[:, 4:25], source)
    assert target[:, :4].isnan().all()
    assert target[:, 25:].isnan().all()
    images = torch.empty(2, 17, 18, 16, 21).permute(0, 4, 2, 1, 3)
    write(images, source)
    assert torch.equal(images, source)
