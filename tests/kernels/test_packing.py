"""Packed weights: made once of frozen weights, and never stale."""

import pytest
import torch
from torch import nn

from acs_triton import convert, frozen, fuse, use_backend
from acs_triton.functional import acs_conv3d, soft_acs_conv3d
from acs_triton.kernels import depthwise, gather_gemm, stem

from . import oracle

FAMILIES = {
    "gather_gemm": ((1, 8, 2, 2, 3), (6, 8, 3, 3), 1),
    "depthwise": ((1, 6, 2, 2, 3), (6, 1, 3, 3), 6),
    "stem": ((1, 3, 2, 2, 3), (6, 3, 3, 3), 1),
}
EDITS = {
    "in place": lambda weight: weight.add_(1),
    "through data": lambda weight: weight.data.mul_(2),
    "other data": lambda weight: setattr(weight, "data", weight.data.clone() + 1),
}


@pytest.fixture
def made(monkeypatch):
    """What was computed to be kept, by name."""
    made, once = [], frozen.once

    def counted(weight, what, compute):
        return once(weight, what, lambda: made.append(what) or compute())

    for module in (gather_gemm, depthwise, stem):
        monkeypatch.setattr(module, "once", counted)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_made_once_and_never_stale(family, device, main_dtype, made):
    input, shape, groups = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(input, generator=generator).to(device.torch_device, main_dtype)
    values = torch.randn(shape, generator=generator).to(x)
    weight = frozen.FrozenParameter(values.clone(), requires_grad=False)

    def run(weight):
        with use_backend("triton"):
            return acs_conv3d(x, weight, padding=1, groups=groups)

    expected = run(values)
    assert len(made) == 1
    for _ in range(2):
        assert torch.equal(run(weight), expected)
    assert len(made) == 2
    for number, edit in enumerate(EDITS.values(), 1):
        edit(weight)
        assert torch.equal(run(weight), run(weight.detach()))
        assert len(made) == 2 + 2 * number  # the ordinary tensor's are made every time


@torch.no_grad()
def test_mixed_views(device, main_dtype, made):
    """The mix is kept with the weight, what is packed of it with the mix; a change of either counts."""
    generator = torch.Generator().manual_seed(0)
    x, *values = (
        torch.randn(size, generator=generator).to(device.torch_device, main_dtype)
        for size in ((1, 8, 2, 2, 3), (6, 8, 3, 3), (6, 3))
    )
    weight, shares = (frozen.FrozenParameter(one, requires_grad=False) for one in values)

    def run(*tensors):
        with use_backend("triton"):
            return soft_acs_conv3d(x, *tensors, padding=1)

    assert torch.equal(run(weight, shares), run(weight, shares))
    assert len(made) == 1
    shares.mul_(2)
    weight.data.add_(1)
    assert torch.equal(run(weight, shares), run(weight.detach(), shares.detach()))


@torch.no_grad()
def test_fused_network(device, main_dtype, made):
    """Stem, depthwise and dense layers with their activations; the second call packs nothing."""
    if not frozen.supported():
        pytest.skip("this PyTorch does not trace frozen parameters")
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU()]
    layers += [nn.Conv2d(8, 5, 2), nn.BatchNorm2d(5), nn.GELU()]
    network = convert(nn.Sequential(*layers).eval())
    for norm in layers[1::3]:
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    x = torch.randn(1, 2, 2, 3, 3).to(device.torch_device, main_dtype)
    expected = network.double()(x.double())
    fused = fuse(network.to(main_dtype), x)
    for _ in range(2):
        with use_backend("triton"):
            found = fused(x)
        assert (found.double() - expected).norm() <= 4 * oracle.RELATIVE_ERROR[main_dtype] * expected.norm()
        assert len(made) == 3
    fused.load_state_dict({name: value * 2 for name, value in fused.state_dict().items()})
    with use_backend("triton"):
        assert not torch.equal(fused(x), found)
    assert len(made) == 6
