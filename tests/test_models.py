"""ACSConv's networks: its parameters, its numbers, and 2D checkpoints."""

import importlib
import sys

import pytest
import torch
from torch import nn

from acs_triton import models
from acs_triton.operators import ACSConv

NETWORKS = [
    ("acsunet", "ACSUNet", {"num_classes": 4}, (1, 8, 16, 12)),
    ("resnet", "FCNResNet", {"pretrained": False, "num_classes": 4}, (3, 8, 4, 12)),
    ("resnet", "ClsResNet", {"pretrained": False, "num_classes": 4}, (3, 5, 7, 9)),
    ("vgg", "FCNVGG", {"pretrained": False, "num_classes": 4}, (3, 4, 8, 4)),
    ("vgg", "ClsVGG", {"pretrained": False, "num_classes": 4}, (3, 4, 9, 5)),
    ("densenet", "FCNDenseNet", {"pretrained": False, "num_classes": 4}, (3, 8, 8, 16)),
    ("densenet", "ClsDenseNet", {"pretrained": False, "num_classes": 4}, (3, 9, 8, 8)),
    ("convnext", "ConvNeXt", {"num_classes": 4, "depths": (1, 2, 1, 1), "dims": (8, 12, 20, 24)}, (3, 32, 32, 64)),
]


def spread_out(network):
    """Fresh scales and statistics (0, 1 or tiny) would hide errors."""
    for name, value in network.state_dict().items():
        if value.dim() == 1:
            nn.init.uniform_(value, *((-0.1, 0.1) if name.endswith(("bias", "mean")) else (0.5, 1.5)))
    return network.eval()


@pytest.mark.filterwarnings("ignore:Importing from timm.models.layers")
@pytest.mark.parametrize(("module", "name", "arguments", "shape"), NETWORKS)
def test_equals_the_published_network(module, name, arguments, shape):
    pytest.importorskip("acsconv.operators", reason="needs ACSConv")
    torch.manual_seed(1)
    published = getattr(importlib.import_module(f"acsconv.models.{module}"), name)(**arguments)
    torch.manual_seed(1)
    ours = getattr(importlib.import_module(f"acs_triton.models.{module}"), name)(**arguments)
    start = published.state_dict()
    assert list(ours.state_dict()) == list(start)
    if name != "ConvNeXt":  # timm's truncated normal draws otherwise than PyTorch's
        assert all(torch.equal(value, start[key]) for key, value in ours.state_dict().items())
    ours.load_state_dict(spread_out(published).state_dict())
    volume = torch.rand(1, *shape)
    with torch.no_grad():
        expected, found = published(volume), ours.eval()(volume)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.std() > 1e-3


def test_bottleneck_equals_the_published_network():
    pytest.importorskip("acsconv.operators", reason="needs ACSConv")
    from acsconv.models import resnet as published

    theirs, ours = spread_out(published.ResNet(published.Bottleneck, [3, 4, 6, 3])), models.resnet50()
    ours.load_state_dict(theirs.state_dict())
    volume = torch.rand(1, 3, 4, 6, 4)
    with torch.no_grad():
        for found, expected in zip(ours.eval()(volume), theirs(volume), strict=True):
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert models.FCNResNet(False, 2, "resnet50").eval()(volume).shape == (1, 2, 4, 6, 4)


@pytest.mark.parametrize("name", ["FCNResNet", "FCNVGG", "FCNDenseNet"])
def test_odd_sizes_come_back(name):
    network = getattr(models, name)(pretrained=False, num_classes=2).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 9, 11, 13)).shape == (1, 2, 9, 11, 13)


def layers_in_order(network, data):
    """The layers with parameters, in the order in which they run."""
    ran = []
    kinds = (nn.Conv2d, ACSConv, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.Linear)
    hooks = [
        module.register_forward_hook(lambda module, args, result: ran.append(module))
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        network(data)
    for hook in hooks:
        hook.remove()
    return ran


CHECKPOINTS = ["resnet18", "vgg11_bn", "densenet121", "convnext_tiny", "timm.convnext_tiny"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_2d_checkpoints_load_layer_by_layer(name):
    library, _, name = name.rpartition(".")
    if library == "timm":
        planar = pytest.importorskip("timm").create_model(name)
    else:
        options = {"init_weights": False} if name.startswith("vgg") else {}
        planar = getattr(pytest.importorskip("torchvision").models, name)(**options)
    spread_out(planar)
    solid = getattr(models, name.removesuffix("_bn"))().eval()
    assert not solid.load_state_dict(planar.state_dict()).missing_keys
    expected, found = (
        layers_in_order(planar, torch.rand(1, 3, 32, 32)),
        layers_in_order(solid, torch.rand(1, 3, 32, 32, 32)),
    )
    assert len(found) > 10
    assert all(isinstance(layer, nn.Linear | nn.modules.batchnorm._BatchNorm) for layer in expected[len(found) :])
    for one, other in zip(expected, found, strict=False):
        assert list(one.state_dict()) == list(other.state_dict())
        assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_all_sizes_take_their_2d_checkpoints():
    torchvision = pytest.importorskip("torchvision")
    for name in ("resnet34", "resnet50", "resnet152", "vgg13", "vgg19", "densenet161"):
        with torch.device("meta"):
            planar = getattr(torchvision.models, name + "_bn" * name.startswith("vgg"))()
            solid = getattr(models, name)()
        solid.load_state_dict(planar.state_dict(), assign=True)


def test_a_checkpoint_of_another_architecture_is_refused():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer1\.2\.conv1\.weight"):
        models.resnet18().load_state_dict(models.resnet34().state_dict())
    with torch.device("meta"):
        planar = pytest.importorskip("torchvision").models.vgg11_bn()
    with pytest.raises(RuntimeError, match="Missing key"):
        models.vgg13().load_state_dict(planar.state_dict())


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match=r"backbone must be one of resnet18, .*, got 'resnet19'"):
        models.ClsResNet(False, 2, backbone="resnet19")
    with pytest.raises(ValueError, match=r"in_22k=True .* needs pretrained=True"):
        models.convnext_tiny(in_22k=True)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"acs-triton\[models\]"):
        models.resnet18(pretrained=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"acs-triton\[models\]"):
        models.convnext_tiny(pretrained=True)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_pretrained_takes_the_published_2d_weights(name, monkeypatch):
    """The download is replaced; that the right weights are asked for is what is tested."""
    torchvision, timm = pytest.importorskip("torchvision"), pytest.importorskip("timm")
    asked = []
    if name == "convnext_tiny":
        state = timm.create_model(name).state_dict()
        monkeypatch.setattr(timm, "create_model", lambda tag, pretrained: asked.append(tag) or Weights(state))
    else:
        state = getattr(torchvision.models, name)().state_dict()

        def get_state_dict(self, *args, **kwargs):
            asked.append(str(self))
            return state

        monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    network = getattr(models, name)(pretrained=True)
    assert asked[0].lower().startswith(name)
    first = next(module for module in network.modules() if isinstance(module, ACSConv))
    assert torch.equal(first.weight, next(value for value in state.values() if value.dim() == 4))


class Weights:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return dict(self.state)
