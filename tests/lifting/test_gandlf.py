"""GaNDLF's 3D networks, unchanged, after ``acs_triton.acsconv_compat.install()``.

GaNDLF pins another PyTorch, so its package is installed without its dependencies, into an
environment of its own that has this library::

    pip install --no-deps GANDLF==0.1.5 segmentation-models-pytorch==0.4.0
    pip install efficientnet-pytorch pretrainedmodels medcam SimpleITK torchio pandas scikit-learn torchmetrics \
        pydicom colorlog deprecated pyyaml psutil lion-pytorch seaborn opencv-python-headless torchinfo panoptica \
        ruamel.yaml plotly
    pytest tests/lifting/test_gandlf.py

Where it is missing, its way to use ACSConv is tested alone.
"""

import importlib
import sys

import pytest
import torch
from torch import nn

import acs_triton.acsconv_compat as compat

CONVERTERS = {"acs": "ACSConverter", "soft": "SoftACSConverter", "conv3d": "Conv3dConverter"}
ENCODERS = ["resnet18", "efficientnet-b0", "vgg11_bn", "resnext50_32x4d", "densenet121", "mobilenet_v2", "se_resnet50"]


@pytest.fixture(autouse=True)
def installed():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "acsconv"}
    compat.install()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "acsconv"]:
        del sys.modules[name]
    sys.modules.update(before)


def train_a_step(network, size=(32, 32, 32)):
    network.train()
    volume = torch.rand(2, 1, *size)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    output = network(volume)
    output.square().mean().backward()
    optimizer.step()
    changed = [not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)]
    assert changed[0]
    assert sum(changed) > len(changed) / 2  # some encoders have parts that only deeper decoders use
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    return output.shape


def gandlf_network(architecture, converter, problem="segmentation", **options):
    models = pytest.importorskip("GANDLF.models", reason="GaNDLF is not installed; see this file's docstring")
    model = {
        "architecture": architecture,
        "dimension": 3,
        "num_channels": 1,
        "num_classes": 2,
        "class_list": [0, 1],
        "base_filters": 8,
        "norm_type": "batch",
        "final_layer": None,
        "amp": False,
        "pretrained": False,
        "converter_type": converter,
        **options,
    }
    parameters = {"model": model, "patch_size": [32, 32, 32], "batch_size": 2, "problem_type": problem}
    return models.global_models_dict[architecture](parameters)


@pytest.mark.parametrize("problem", ["segmentation", "classification"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("converter", CONVERTERS)
def test_imagenet_unet(converter, encoder, problem):
    shape = train_a_step(gandlf_network("imagenet_unet", converter, problem, encoder_name=encoder))
    assert shape == ((2, 2, 32, 32, 32) if problem == "segmentation" else (2, 2))


@pytest.mark.parametrize("architecture", ["unet", "resunet", "light_unet", "uinc"])
@pytest.mark.parametrize("converter", CONVERTERS)
def test_native_networks_pass_through(converter, architecture):
    network = gandlf_network(architecture, converter, final_layer="softmax")
    assert train_a_step(network) == (2, 2, 32, 32, 32)


# ---- the same calls without GaNDLF


class Interpolate(nn.Module):
    """A 3D function in a module of its own: neither a 2D nor a 3D module inside."""

    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)


class Upsampling(nn.Module):
    def __init__(self):
        super().__init__()
        self.interpolate, self.conv = Interpolate(), nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.conv(self.interpolate(x))


@pytest.mark.parametrize("converter", CONVERTERS)
def test_parts_of_a_3d_network_are_converted_one_by_one(converter):
    convert = getattr(importlib.import_module("acsconv.converters"), CONVERTERS[converter])
    down, up = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.LeakyReLU()), Upsampling()
    volume = torch.rand(2, 1, 8, 12, 16)
    expected = up(down(volume))
    network = nn.Sequential(convert(down).model, convert(up).model)
    torch.testing.assert_close(network(volume), expected)
    assert train_a_step(network, (8, 12, 16)) == (2, 2, 8, 12, 16)


@pytest.mark.parametrize("classes", [None, {"classes": 3, "pooling": "avg", "dropout": 0.2, "activation": None}])
@pytest.mark.parametrize("converter", CONVERTERS)
def test_an_encoder_and_a_head_of_segmentation_models(converter, classes):
    base = pytest.importorskip("segmentation_models_pytorch.base")
    encoders = importlib.import_module("segmentation_models_pytorch.encoders")
    convert = getattr(importlib.import_module("acsconv.converters"), CONVERTERS[converter])

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoders.get_encoder("resnet18", in_channels=1, depth=3, weights=None)
            channels = self.encoder.out_channels[-1]
            if classes is None:
                self.head = base.SegmentationHead(channels, 2, kernel_size=3, upsampling=8)
            else:
                self.head = base.ClassificationHead(channels, **classes)

        def forward(self, x):
            return self.head(self.encoder(x)[-1])

    shape = train_a_step(convert(Network()).model, (16, 32, 24))
    assert shape == ((2, 2, 16, 32, 24) if classes is None else (2, 3))
