"""Convolution layers by shape, and their primitives called as a training step calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from acs_triton.arguments import conv_params
from acs_triton.backends import triton as triton_backend
from acs_triton.geometry import Geometry, Triple

PRIMITIVES = ("conv", "input_grad", "weight_grad")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """An ACS convolution of a ``k x k`` kernel with "same" padding on volumes of one size.

    ``soft``: of mixed views. ``activation``: of :data:`acs_triton.activations.ACTIVATIONS`, or none.
    """

    in_channels: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    size: Triple = (32, 32, 32)
    batch: int = 2
    channels_last: bool = True
    bias: bool = True
    soft: bool = False
    activation: str = ""

    @property
    def geometry(self) -> Geometry:
        kernel, padding = (self.kernel,) * 2, self.kernel // 2
        params = conv_params(kernel, self.out_channels, self.stride, padding, 1, self.groups, None)
        return (params.mixed() if self.soft else params).geometry(self.size)

    def run(self, primitive: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Call one primitive of the Triton backend on uninitialised tensors."""
        layout = torch.channels_last_3d if self.channels_last else torch.contiguous_format
        to = {"dtype": dtype, "device": device}
        geometry = self.geometry
        input = torch.empty((self.batch, self.in_channels, *self.size), **to, memory_format=layout)
        kernel = ((3,) if self.soft else ()) + (self.kernel,) * 2
        weight = torch.empty((self.out_channels, self.in_channels // self.groups, *kernel), **to)
        grad = torch.empty((self.batch, self.out_channels, *geometry.output_size), **to, memory_format=layout)
        if primitive == "conv":
            bias = torch.empty(self.out_channels, **to) if self.bias else None
            return triton_backend.conv_act(input, weight, bias, self.activation, geometry)
        if primitive == "input_grad":
            return triton_backend.input_grad(grad, weight, geometry)
        return triton_backend.weight_grad(grad, input, geometry)


TYPICAL = (
    Layer(64, 192),
    Layer(128, 128, stride=2),
    Layer(64, 64, groups=2),
    Layer(64, 64, soft=True),
    Layer(256, 256, size=(4, 4, 4)),
    Layer(64, 192, channels_last=False),
    Layer(96, 96, groups=96),
    Layer(144, 144, kernel=5, stride=2, groups=144),
    Layer(3, 64, kernel=7, stride=2, size=(64, 64, 64)),
)
"""What usual encoders are made of: dense, strided, grouped, depthwise, first and last layers; one in plain memory."""


def resnet50(size: Triple, batch: int = 2) -> Iterator[Layer]:
    """The convolutions of a ResNet-50 (torchvision's) lifted to volumes of one channel-triple and ``size``."""

    def halved(size: Triple) -> Triple:
        return tuple(-(-n // 2) for n in size)

    yield Layer(3, 64, kernel=7, stride=2, size=size, batch=batch, bias=False)
    size, channels = halved(halved(size)), 64  # the first layer and the max pool
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            common = {"batch": batch, "bias": False}
            yield Layer(channels, width, kernel=1, size=size, **common)
            yield Layer(width, width, stride=stride, size=size, **common)
            if block == 0:
                yield Layer(channels, 4 * width, kernel=1, stride=stride, size=size, **common)
            size = halved(size) if stride == 2 else size
            yield Layer(width, 4 * width, kernel=1, size=size, **common)
            channels = 4 * width
