"""ACSConv's small U-Net, that of the paper's proof of concept (Yang et al., arXiv:1911.10477)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layout import channels_last
from ..operators import ACSConv


def _twice(in_channels: int, middle_channels: int, out_channels: int) -> list[nn.Module]:
    layers = []
    for before, after in ((in_channels, middle_channels), (middle_channels, out_channels)):
        layers += [ACSConv(before, after, kernel_size=3, padding=1), nn.BatchNorm3d(after), nn.ReLU(inplace=True)]
    return layers


class _EncoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.encode = nn.Sequential(*_twice(in_channels, out_channels, out_channels), nn.MaxPool3d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class _DecoderBlock(nn.Module):
    def __init__(self, in_channels: int, middle_channels: int, out_channels: int):
        super().__init__()
        self.decode = nn.Sequential(*_twice(in_channels, middle_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(x)


class ACSUNet(nn.Module):
    """Two halvings down, two doublings up, one skip connection.

    Shape: ``(N, 1, D, H, W)`` to ``(N, num_classes, D', H', W')`` logits, where ``D'`` is the largest even
    number up to ``D``.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.enc1 = _EncoderBlock(1, 64)
        self.enc2 = _EncoderBlock(64, 128)
        self.dec1 = _DecoderBlock(192, 64, 32)
        self.final = ACSConv(32, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.enc1(channels_last(x))
        x = F.interpolate(self.enc2(half), size=half.shape[2:], mode="trilinear")
        x = self.dec1(torch.cat([half, x], 1))
        return self.final(F.interpolate(x, scale_factor=2, mode="trilinear")).contiguous()
