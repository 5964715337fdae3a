"""Packed weights: what is where, made once of frozen weights, and never stale."""

import itertools

import pytest
import torch
from torch import nn

from acs_triton import convert, frozen, fuse, use_backend
from acs_triton.functional import acs_conv3d, soft_acs_conv3d
from acs_triton.kernels import depthwise, gather_tables, packing, stem
from acs_triton.kernels.descriptor_tables import Tile
from acs_triton.merging import merge

from . import oracle
from .cases import Case

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

    for module in (packing, depthwise, stem):
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("split", "merged", "groups"),
    [(None, False, 1), (None, True, 1), ((), True, 1), (None, False, 2), ((0, 4, 6), False, 1)],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_block_by_its_definition(transposed, split, merged, groups, channels_last, device, make):
    """Steps of (tap, block), rows and depth filled up with zeros; whatever memory a weight lies in."""
    case = Case(36, 10, (3, 4, 5), split=split, groups=groups, rule="aligned")
    geometry, tile = case.geometry, Tile(64, (4, 4, 8), 16, 4, 2, merged)
    weight = make(case.weight_shape, torch.float16, 1)
    if channels_last:
        weight = weight.transpose(1, -1).contiguous().transpose(1, -1)
    taps = merge(weight, geometry) if merged else weight.flatten(2)
    regions = gather_tables.regions(geometry, 10, merged)
    each, count = 36 // groups, taps.shape[2]
    blocks = []
    if transposed:
        windows = gather_tables.windows(geometry, 10, 16, 8, merged)
        order = itertools.product(range(groups), range(count), range(windows[0][-1].first_block + 1))
        made = [step for step in order if step != (0, 4, 0)]  # a tap that reaches no position
        packed = packing.pack(weight, packing.input_grad(geometry, 36, 10, 64, tile, 8, made, weight.device), 16)
        for group, tap, block in made:
            expected = torch.zeros(64, 16, dtype=weight.dtype, device=weight.device)
            for window in windows[group]:
                if window.first_block <= block < window.first_block + window.blocks:
                    first = window.start + 16 * (block - window.first_block)
                    for o in range(max(first, window.region.first), min(first + 16, window.region.end)):
                        expected[:each, o - first] = taps[o, :, tap]
            blocks.append(expected)
    else:
        packed = packing.pack(weight, packing.forward(geometry, 36, 10, 64, tile, weight.device), 16)
        for tap in range(count):
            for block in range(-(-each // 16)):
                expected = torch.zeros(64 * len(regions), 16, dtype=weight.dtype, device=weight.device)
                width = min(16, each - 16 * block)
                for number, region in enumerate(regions):
                    rows = taps[region.first : region.end, 16 * block : 16 * block + width, tap]
                    expected[64 * number : 64 * number + len(rows), :width] = rows
                blocks.append(expected)
    torch.testing.assert_close(
        packed, torch.stack(blocks), rtol=1e-3 if split == () else 0, atol=1e-3 if split == () else 0
    )
