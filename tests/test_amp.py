"""Mixed precision: autocast on the CPU, gradient scaling, and dtypes that do not go together."""

import pytest
import torch
from torch import nn

from acs_triton import explain, ops
from acs_triton.functional import acs_conv3d, conv2_5d, soft_acs_conv3d
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv

LOW = [torch.bfloat16, torch.float16]


def layers(**options):
    return [layer(3, 4, 3, padding=1, **options) for layer in (ACSConv, SoftACSConv, Conv2_5d)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
def test_autocast_computes_and_returns_what_conv3d_does(layer, dtype):
    x, plain = torch.randn(2, 3, 5, 6, 7), nn.Conv3d(3, 4, 3, padding=1)
    seen = []
    with torch.autocast("cpu", dtype=dtype):
        for module in (layer, plain):
            y = module(x)
            grads = torch.autograd.grad(y.float().square().sum(), tuple(module.parameters()))
            seen.append([y.dtype, *{grad.dtype for grad in grads}])
    assert seen[0] == seen[1] == [dtype, torch.float32]
    low = type(layer)(3, 4, 3, padding=1, dtype=dtype)
    low.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x), layer(x.to(dtype)))
        if not isinstance(layer, SoftACSConv):  # its softmax stays in float32, as autocast has it
            assert torch.equal(layer(x), low(x.to(dtype)))
    torch.testing.assert_close(layer(x).to(dtype), low(x.to(dtype)), rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_and_disabled_regions_alone():
    x, weight = torch.randn(1, 3, 5, 5, 5), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert acs_conv3d(x.double(), weight.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(acs_conv3d(x, weight), acs_conv3d(x.clone(), weight))
            assert acs_conv3d(x, weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW)
def test_the_operators_run_in_the_low_precision(dtype, monkeypatch):
    """Forward and backward, also where the backward pass runs inside the region."""
    seen = set()
    for name in ("conv", "input_grad", "weight_grad", "gradients"):
        original = getattr(ops.backends.torch_backend, name)

        def spy(*args, original=original):
            seen.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
            return original(*args)

        monkeypatch.setattr(ops.backends.torch_backend, name, spy)
    layer = ACSConv(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 6, 7, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        layer(x).float().sum().backward()
    assert seen == {dtype}
    assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.float32, torch.float32)


def test_autocast_of_a_compiled_network():
    net = nn.Sequential(*(layer for layer in (ACSConv(3, 4, 3), nn.ReLU(), ACSConv(4, 2, 3, padding=1))))
    x = torch.randn(2, 3, 6, 7, 5)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(x), net(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_training_with_a_gradient_scaler():
    """The unscaled gradients are the plain ones, an overflow skips its step and lowers the scale, the loss falls."""
    net = nn.Sequential(ACSConv(1, 6, 3, padding=1), nn.ReLU(), ACSConv(6, 1, 3, padding=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    x = torch.randn(2, 1, 6, 6, 6)

    def backward(factor=1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (net(x).float() - x.flip(2)).square().mean() * factor
        scaler.scale(loss).backward()
        return loss.item()

    backward()
    scaler.unscale_(optimizer)
    found = [p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    (net(x) - x.flip(2)).square().mean().backward()
    for grad, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=0.05, atol=5e-3)
    scaler.update()

    before, scale = [p.detach().clone() for p in net.parameters()], scaler.get_scale()
    backward(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(one, p) for one, p in zip(before, net.parameters(), strict=True))

    losses = []
    for _ in range(20):
        losses.append(backward())
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
def test_mixed_dtypes_raise_as_in_conv3d(layer):
    x = torch.randn(1, 3, 5, 5, 5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(RuntimeError):
            nn.Conv3d(3, 4, 3)(x.to(dtype))
        with pytest.raises(TypeError, match=f"weight has dtype torch.float32, input has {dtype}"):
            layer(x.to(dtype))


@pytest.mark.parametrize("function", [acs_conv3d, conv2_5d, soft_acs_conv3d])
def test_mixed_dtypes_go_together_under_autocast(function):
    x, weight, bias = torch.randn(1, 3, 5, 5, 5), torch.randn(4, 3, 3, 3).bfloat16(), torch.randn(4)
    more = (torch.full((4, 3), 1 / 3),) if function is soft_acs_conv3d else ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(x, weight, *more, bias).dtype == torch.bfloat16


def test_explain_speaks_of_the_cast_tensors():
    x, weight = torch.zeros(1, 3, 8, 8, 8), torch.zeros(6, 3, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="dtype"):
        explain(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "conv " in explain(x, weight)
