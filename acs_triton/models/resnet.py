"""ResNets (He et al., arXiv:1512.03385) of ACS layers, at ACSConv's resolution.

Unlike torchvision's they halve the volume twice, in ``layer2`` and ``layer4``, not five times.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ..operators import ACSConv
from .backbone import FCN, Backbone, Classifier, backbone_named, initialise, load_imagenet


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = ACSConv(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = ACSConv(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = ACSConv(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = ACSConv(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = ACSConv(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(Backbone):
    """``(N, 3, D, H, W)`` to maps at a quarter, half and all of the size.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: blocks in each of the four layers.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: list[int]):
        super().__init__()
        self.channels = (512 * block.expansion, 128 * block.expansion, 64)
        self.inplanes = 64
        self.conv1 = ACSConv(3, 64, 7, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._layer(block, 64, layers[0])
        self.layer2 = self._layer(block, 128, layers[1], stride=2)
        self.layer3 = self._layer(block, 256, layers[2])
        self.layer4 = self._layer(block, 512, layers[3], stride=2)
        initialise(self)

    def _layer(self, block, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        width = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != width:
            downsample = nn.Sequential(ACSConv(self.inplanes, width, 1, stride, bias=False), nn.BatchNorm3d(width))
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = width
        return nn.Sequential(first, *(block(width, planes) for _ in range(1, blocks)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        full = self.relu(self.bn1(self.conv1(x)))
        middle = self.layer2(self.layer1(full))
        return self.layer4(self.layer3(middle)), middle, full


def _resnet(name: str, block, layers: list[int], pretrained: bool = False) -> ResNet:
    network = ResNet(block, layers)
    if pretrained:
        load_imagenet(network, name)
    return network


resnet18 = partial(_resnet, "resnet18", BasicBlock, [2, 2, 2, 2])
resnet34 = partial(_resnet, "resnet34", BasicBlock, [3, 4, 6, 3])
resnet50 = partial(_resnet, "resnet50", Bottleneck, [3, 4, 6, 3])
resnet101 = partial(_resnet, "resnet101", Bottleneck, [3, 4, 23, 3])
resnet152 = partial(_resnet, "resnet152", Bottleneck, [3, 8, 36, 3])
RESNETS = {network.args[0]: network for network in (resnet18, resnet34, resnet50, resnet101, resnet152)}


class FCNResNet(FCN):
    """Segmentation over a ResNet, from ``resnet18`` to ``resnet152``."""

    def __init__(self, pretrained: bool, num_classes: int, backbone: str = "resnet18"):
        super().__init__(backbone_named(RESNETS, backbone, pretrained), num_classes, widths=(512, 512))


class ClsResNet(Classifier):
    """Classification over a ResNet, from ``resnet18`` to ``resnet152``."""

    def __init__(self, pretrained: bool, num_classes: int, backbone: str = "resnet18"):
        super().__init__(backbone_named(RESNETS, backbone, pretrained), num_classes)
