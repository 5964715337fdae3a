"""LiftedUNet: encoders of several libraries, kinds, norms, anisotropic voxels, deep supervision."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from acs_triton.lifting import KINDS, convert
from acs_triton.models import LiftedUNet, Pyramid
from acs_triton.operators import ACSConv

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def small():
    """A 2D network with maps at strides 2 and 4."""
    torch.manual_seed(0)
    return Maps()


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 9, 3, padding=1), nn.GELU())

    def forward(self, x):
        x = self.stem(x)
        return {"half": x, "quarter": self.body(x)}


def smp_encoder(name):
    return pytest.importorskip("segmentation_models_pytorch").encoders.get_encoder(name, weights=None)


ENCODERS = {
    "timm name": (lambda: "test_resnet", (2, 4, 8, 16, 32)),
    "timm, stem of 4": (lambda: timm.create_model("test_convnext", features_only=True), (4, 8, 16, 32)),
    "timm, largest map as the image": (
        lambda: timm.create_model("vgg11", features_only=True, out_indices=(0, 1)),
        (1, 2),
    ),
    "smp, lists the image": (lambda: smp_encoder("mobilenet_v2"), (2, 4, 8, 16, 32)),
    "smp, lists a map without channels": (lambda: smp_encoder("mit_b0"), (4, 8, 16, 32)),
    "torchvision, nested": (torchvision.models.mobilenet_v3_small, (2, 4, 8, 16, 32)),
    "torchvision, flat": (torchvision.models.resnet18, (2, 4, 8, 16, 32)),
    "own, mapping": (small, (2, 4)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    make, strides = ENCODERS[name]
    unet = LiftedUNet(make(), in_channels=2, classes=3)
    assert unet.encoder.strides == strides
    volume = torch.rand(2, 2, 32, 33, 40)
    logits = unet(volume)
    assert logits.shape == (2, 3, 32, 33, 40)
    logits.square().mean().backward()
    assert not [key for key, value in unet.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    maps = unet.encoder(volume)
    assert [item.shape[1] for item in maps] == list(unet.encoder.channels)
    assert any(isinstance(module, ACSConv) for module in unet.ups.modules())


def resnet_maps(network, x):
    yield (x := network.relu(network.bn1(network.conv1(x))))
    x = network.maxpool(x)
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        yield (x := layer(x))


def swin_maps(network, x):
    yield from (item.permute(0, 3, 1, 2) for item in network(x))


@pytest.mark.parametrize(
    ("make", "maps_of", "side", "depth"),
    [
        (torchvision.models.resnet18, resnet_maps, 64, 32),
        (lambda: timm.create_model("swin_s3_tiny_224", features_only=True, out_indices=(0, 1)), swin_maps, 224, 4),
    ],
)
def test_maps_are_those_of_the_2d_network(make, maps_of, side, depth):
    """With (1, k, k) kernels, a volume of equal slices must give the 2D network's own maps."""
    network, image = make().eval(), torch.rand(1, 3, side, side)
    with torch.no_grad():
        expected = list(maps_of(network, image))
        found = convert(Pyramid(network), "2.5d")(image.unsqueeze(2).expand(-1, -1, depth, -1, -1))
    assert len(found) == len(expected)
    for volume, planar in zip(found, expected, strict=True):
        assert (volume - planar.unsqueeze(2)).abs().max() < 1e-5 * planar.abs().max()


def test_weights_stay_and_the_head_goes():
    network = torchvision.models.resnet18()
    state = copy.deepcopy(network.state_dict())
    unet = LiftedUNet(network, in_channels=3, classes=2)
    assert unet.training
    kept = unet.encoder.network.state_dict()
    assert set(state) - set(kept) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, state[key]) for key, value in kept.items())
    # A checkpoint of the 2D network still loads, for another number of channels too.
    single = LiftedUNet(torchvision.models.resnet18(), in_channels=1, classes=2)
    assert single.encoder.network.load_state_dict(state, strict=False).unexpected_keys == ["fc.weight", "fc.bias"]
    grey = torch.rand(1, 1, 16, 32, 32)
    single.eval(), unet.eval()
    for one, three in zip(single.encoder(grey), unet.encoder(grey.expand(-1, 3, -1, -1, -1)), strict=True):
        assert (one - three).abs().max() < 1e-5 * three.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_train(kind):
    unet = LiftedUNet(small(), in_channels=1, classes=2, kind=kind, norm="instance", decoder_channels=(8, 6))
    volume = nn.functional.interpolate(torch.rand(1, 1, 2, 3, 4), scale_factor=4, mode="trilinear")
    labels = (volume[:, 0] > 0.5).long()
    optimizer = torch.optim.Adam(unet.parameters(), 0.02)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(unet(volume), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_slices_do_not_mix_in_25d_and_do_in_acs():
    volume = torch.rand(1, 3, 1, 16, 16).expand(-1, -1, 8, -1, -1).clone()
    for kind in ("2.5d", "acs"):
        unet = LiftedUNet(small(), in_channels=3, classes=2, kind=kind).eval()
        logits = unet(volume)
        equal = torch.allclose(logits, logits[:, :, :1].expand_as(logits), atol=1e-6)
        assert equal == (kind == "2.5d")  # zeros around the volume are seen by ACS


def test_deep_supervision():
    losses = pytest.importorskip("monai.losses")
    unet = LiftedUNet(small(), in_channels=1, classes=3, deep_supervision=1)
    volume = torch.rand(2, 1, 8, 12, 9)
    outputs = unet(volume)
    assert [tuple(item.shape[2:]) for item in outputs] == [(8, 12, 9), (4, 6, 5)]
    loss = losses.DeepSupervisionLoss(losses.DiceCELoss(to_onehot_y=True, softmax=True))
    loss(outputs, (volume > 0.5).float()).backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    assert torch.is_tensor(unet.eval()(volume))


SPACINGS = {
    (1, 1, 1): (16, 8),
    (1.9, 1, 1): (16, 8),
    (2.5, 1, 1.2): (32, 16),
    (5, 0.9, 0.9): (32, 32),
    (1, 1, 1.9): (16, 8),
}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_thick_slices_are_kept(spacing):
    unet = LiftedUNet(small(), spacing=spacing)
    maps = unet.encoder(torch.rand(1, 1, 32, 32, 32))
    assert tuple(item.shape[2] for item in maps) == SPACINGS[spacing]
    assert all(item.shape[3] == 32 // stride for item, stride in zip(maps, unet.encoder.strides, strict=True))
    assert unet(torch.rand(2, 1, 5, 20, 24)).shape == (2, 2, 5, 20, 24)


def test_kernels_that_cannot_keep_the_depth_stay_in_their_slice():
    """ConvNeXt's stem (4 x 4, no padding) and TensorFlow's uneven padding; nothing is cut off."""
    for name in ("test_convnext", "tf_mobilenetv3_small_minimal_100"):
        encoder = timm.create_model(name, features_only=True, out_indices=(0, 1))
        unet = LiftedUNet(encoder, kind="soft", spacing=(4, 1, 1))
        maps = unet.encoder(torch.rand(1, 1, 12, 32, 32))
        assert tuple(item.shape[2] for item in maps) == ((12, 6) if name == "test_convnext" else (12, 12))
        flat = [layer for layer in convolutions(unet.encoder) if layer._acs_lift.kind == "2.5d"]
        assert 0 < len(flat) < len(list(convolutions(unet.encoder)))
        assert not any(hasattr(layer, "soft_w_core") for layer in flat)  # it would have no gradient


def convolutions(network):
    return (module for module in network.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("rules", [{"network.body.1": {"kind": "2.5d"}}, lambda path, module: {"kind": "2.5d"}])
@pytest.mark.parametrize("spacing", [None, (2, 1, 1)])
def test_rules_reach_the_encoder(rules, spacing):
    unet = LiftedUNet(small(), rules=rules, spacing=spacing)
    assert unet.encoder.network.body[1]._acs_lift.kind == "2.5d"
    assert unet.encoder.network.stem[0]._acs_lift.depth_stride == (None if spacing is None else 1)
    assert unet.encoder.network.stem[0]._acs_lift.kind == ("2.5d" if callable(rules) else "acs")


def test_copies_pickles_and_checkpoints():
    unet = LiftedUNet(torchvision.models.resnet18(), classes=2, spacing=(2, 1, 1)).eval()
    volume = torch.rand(1, 1, 8, 32, 32)
    expected = unet(volume)
    other = LiftedUNet(torchvision.models.resnet18(), classes=2, spacing=(2, 1, 1)).eval()
    assert not torch.equal(other(volume), expected)
    other.load_state_dict(unet.state_dict())
    for same in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet)), other):
        assert torch.equal(same(volume), expected)


def test_compiles_whole():
    unet = LiftedUNet(small(), classes=2).eval()
    volume = torch.rand(1, 1, 8, 12, 16)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(volume), unet(volume))


def test_modes_of_the_encoder_stay():
    network = small()
    network.stem.eval()
    unet = LiftedUNet(network)
    assert unet.encoder.network.body.training
    assert not unet.encoder.network.stem[1].training


class Branches(nn.Module):
    """Gives a vector, by a path that is no chain."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return (self.one(x) + self.two(x)).mean((2, 3))


BAD = [
    ({"kind": "4d"}, ValueError, r"kind must be one of 'acs', .*, got '4d'"),
    ({"norm": "group"}, ValueError, r"norm must be one of 'batch', 'instance', got 'group'"),
    ({"in_channels": 0}, ValueError, r"in_channels must be an int of at least 1, got 0"),
    ({"classes": 1.5}, ValueError, r"classes must be an int of at least 1, got 1\.5"),
    ({"deep_supervision": 2}, ValueError, r"deep_supervision must be less than the 2 steps, got 2"),
    ({"decoder_channels": (8,)}, ValueError, r"decoder_channels must have 2 entries .*, got \(8,\)"),
    ({"pretrained": True}, ValueError, r"pretrained=True needs the name of a timm network"),
    ({"spacing": (5, 1)}, ValueError, r"spacing must be three positive sizes \(D, H, W\), got \(5, 1\)"),
    ({"spacing": (1, 5, 1)}, ValueError, r"coarse axis first, .*, got \(1, 5, 1\)"),
    ({"spacing": (1, 3, 3)}, ValueError, r"coarse axis first, .*, got \(1, 3, 3\)"),
    ({"rules": {"nothing": {"kind": "acs"}}}, ValueError, r"no module is named like 'nothing'"),
    ({"encoder": nn.Sequential(nn.Linear(3, 3))}, ValueError, r"encoder Sequential has no Conv2d"),
    ({"encoder": Branches()}, ValueError, r"encoder Branches .* no chain of layers\. Give .* features_only=True"),
    ({"encoder": "test_vit"}, ValueError, r"must give feature maps at falling sizes; of an image \(1, 3, 224, 224\)"),
    ({"encoder": convert(small())}, ValueError, r"encoder is converted already; give the 2D network"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LiftedUNet(**{"encoder": small(), **arguments})


def test_bad_input():
    with pytest.raises(ValueError, match=r"volumes \(N, C, D, H, W\), got shape \(1, 1, 8, 8\)"):
        LiftedUNet(small())(torch.rand(1, 1, 8, 8))


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'resnet18' needs timm: pip install 'acs-triton\[models\]'"):
        LiftedUNet("resnet18")
