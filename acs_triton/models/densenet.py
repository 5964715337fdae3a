"""DenseNets (Huang et al., arXiv:1608.06993) of ACS layers, at ACSConv's resolution.

Unlike torchvision's they halve the volume three times, in the transitions, not five times.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..operators import ACSConv
from .backbone import FCN, Backbone, Classifier, backbone_named, load_imagenet


class _DenseLayer(nn.Sequential):
    """Appends ``growth_rate`` channels to its input."""

    def __init__(self, in_channels: int, growth_rate: int, bn_size: int, drop_rate: float):
        inner = bn_size * growth_rate
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm3d(in_channels),
                relu1=nn.ReLU(inplace=True),
                conv1=ACSConv(in_channels, inner, 1, bias=False),
                norm2=nn.BatchNorm3d(inner),
                relu2=nn.ReLU(inplace=True),
                conv2=ACSConv(inner, growth_rate, 3, padding=1, bias=False),
            )
        )
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(super().forward(x), self.drop_rate, self.training)], 1)


def _transition(in_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm3d(in_channels),
            relu=nn.ReLU(inplace=True),
            conv=ACSConv(in_channels, in_channels // 2, 1, bias=False),
            pool=nn.AvgPool3d(2),
        )
    )


class DenseNet(Backbone):
    """``(N, 3, D, H, W)`` to maps at an eighth, a quarter and all of the size.

    Args:
        growth_rate: channels that each dense layer adds.
        block_config: dense layers in each of the four blocks.
        num_init_features: channels of the first convolution.
        bn_size: channels of a dense layer's 1x1 convolution, in growth rates.
        drop_rate: of dropout after each dense layer.
    """

    def __init__(self, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64, bn_size=4, drop_rate=0.0):
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                conv0=ACSConv(3, num_init_features, 7, padding=3, bias=False),
                norm0=nn.BatchNorm3d(num_init_features),
                relu0=nn.ReLU(inplace=True),
            )
        )
        width, widths = num_init_features, []
        for number, count in enumerate(block_config, start=1):
            block = OrderedDict()
            for index in range(count):
                block[f"denselayer{index + 1}"] = _DenseLayer(width, growth_rate, bn_size, drop_rate)
                width += growth_rate
            layer = OrderedDict([(f"denseblock{number}", nn.Sequential(block))])
            if number < len(block_config):
                layer[f"transition{number}"] = _transition(width)
                width //= 2
            widths.append(width)
            self.add_module(f"layer{number}", nn.Sequential(layer))
        self.channels = (widths[3], widths[1], num_init_features)
        for module in self.modules():
            if isinstance(module, ACSConv):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = self.features(x)
        middle = self.layer2(self.layer1(full))
        return self.layer4(self.layer3(middle)), middle, full


def _densenet(name: str, growth_rate, block_config, num_init_features, pretrained: bool = False, **options) -> DenseNet:
    network = DenseNet(growth_rate, block_config, num_init_features, **options)
    if pretrained:
        load_imagenet(network, name)
    return network


densenet121 = partial(_densenet, "densenet121", 32, (6, 12, 24, 16), 64)
densenet161 = partial(_densenet, "densenet161", 48, (6, 12, 36, 24), 96)
densenet169 = partial(_densenet, "densenet169", 32, (6, 12, 32, 32), 64)
densenet201 = partial(_densenet, "densenet201", 32, (6, 12, 48, 32), 64)
DENSENETS = {network.args[0]: network for network in (densenet121, densenet161, densenet169, densenet201)}


class FCNDenseNet(FCN):
    """Segmentation over a DenseNet, from ``densenet121`` to ``densenet201``."""

    def __init__(self, pretrained: bool, num_classes: int, backbone: str = "densenet121"):
        super().__init__(backbone_named(DENSENETS, backbone, pretrained), num_classes, widths=(256, 64))


class ClsDenseNet(Classifier):
    """Classification over a DenseNet, from ``densenet121`` to ``densenet201``."""

    def __init__(self, pretrained: bool, num_classes: int, backbone: str = "densenet121"):
        super().__init__(backbone_named(DENSENETS, backbone, pretrained), num_classes)
