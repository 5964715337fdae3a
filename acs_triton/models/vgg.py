"""VGGs with batch norm (Simonyan & Zisserman, arXiv:1409.1556) of ACS layers, at ACSConv's resolution.

Unlike torchvision's they halve the volume twice, before the third and the fifth layer, not five times.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from ..operators import ACSConv
from .backbone import FCN, Backbone, Classifier, backbone_named, initialise, load_imagenet


class VGG(Backbone):
    """``(N, 3, D, H, W)`` to maps at a quarter, half and all of the size.

    Args:
        convolutions: in each of the five layers.
    """

    channels = (512, 256, 64)

    def __init__(self, convolutions: tuple[int, ...]):
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        for index, count in enumerate(convolutions):
            layers = OrderedDict([("maxpool0", nn.MaxPool3d(2))] if index in (2, 4) else [])
            for number in range(count):
                before = widths[index] if number == 0 else widths[index + 1]
                layers[f"conv{number}"] = ACSConv(before, widths[index + 1], 3, padding=1)
                layers[f"bn{number}"] = nn.BatchNorm3d(widths[index + 1])
                layers[f"relu{number}"] = nn.ReLU(inplace=True)
            self.add_module(f"layer{index}", nn.Sequential(layers))
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = self.layer0(x)
        middle = self.layer2(self.layer1(full))
        return self.layer4(self.layer3(middle)), middle, full


def _vgg(name: str, convolutions: tuple[int, ...], pretrained: bool = False) -> VGG:
    network = VGG(convolutions)
    if pretrained:
        load_imagenet(network, f"{name}_bn")
    return network


vgg11 = partial(_vgg, "vgg11", (1, 1, 2, 2, 2))
vgg13 = partial(_vgg, "vgg13", (2, 2, 2, 2, 2))
vgg16 = VGG16_bn = partial(_vgg, "vgg16", (2, 2, 3, 3, 3))
vgg19 = partial(_vgg, "vgg19", (2, 2, 4, 4, 4))
VGGS = {network.args[0]: network for network in (vgg11, vgg13, vgg16, vgg19)} | {"VGG16_bn": VGG16_bn}


class FCNVGG(FCN):
    """Segmentation over a VGG, from ``vgg11`` to ``vgg19``."""

    def __init__(self, pretrained: bool, num_classes: int, backbone: str = "vgg16"):
        super().__init__(backbone_named(VGGS, backbone, pretrained), num_classes, widths=(256, 64))


class ClsVGG(Classifier):
    """Classification over a VGG, from ``vgg11`` to ``vgg19``."""

    def __init__(self, pretrained: bool, num_classes: int, backbone: str = "vgg16"):
        super().__init__(backbone_named(VGGS, backbone, pretrained), num_classes)
