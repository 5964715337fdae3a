"""Convolutions part by part, so that infinite and NaN values reach what they are connected to and nothing else.

The matrix kernels take channels of several views and groups at once: each value meets the weights of
its own, and zeros where another's are, and zero times infinity is NaN. Here each part of the output
channels that reads the same channels at the same positions is a convolution of its own. That takes
several times as long, and is done while the origin of a NaN is looked for
(:class:`torch.autograd.detect_anomaly`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..geometry import Geometry
from ..kernels import gather_tables
from ..layout import memory_format


@dataclass(frozen=True)
class Part:
    """Output channels that read the channels of one group at the same positions.

    Attributes:
        output, input: its channels of the output and the input.
        geometry: of one group, and of one view or of mixed ones.
    """

    output: slice
    input: slice
    geometry: Geometry

    def operands(self, primitive: str, data: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a primitive's first two tensors."""
        if primitive == "conv":
            return data[:, self.input], other[self.output]
        return data[:, self.output], other[self.output] if primitive == "input_grad" else other[:, self.input]


def parts(geometry: Geometry, in_channels: int, out_channels: int) -> list[Part]:
    """The parts of a convolution while the origin of a NaN is looked for; none where its kernels are exact."""
    if not torch.is_anomaly_enabled():
        return []
    from ..kernels import depthwise

    if depthwise.suits(geometry, in_channels, out_channels):
        return []
    regions, per_group = gather_tables.regions(geometry, out_channels), in_channels // geometry.groups
    if len(regions) == 1:
        return []
    result = []
    for one in regions:
        part = geometry if geometry.mixed else geometry.one_view(one.view, one.end - one.first)
        input = slice(one.group * per_group, (one.group + 1) * per_group)
        result.append(Part(slice(one.first, one.end), input, replace(part, groups=1)))
    return result


def conv(of_part: Callable[..., Tensor], parts: list[Part], input: Tensor, weight: Tensor, bias: Tensor | None):
    """The convolution, by ``of_part(input, weight, bias, geometry)``."""
    results = [
        of_part(*one.operands("conv", input, weight), None if bias is None else bias[one.output], one.geometry)
        for one in parts
    ]
    return torch.cat(results, 1).contiguous(memory_format=memory_format(input))


def input_grad(of_part: Callable[..., Tensor], parts: list[Part], grad_output: Tensor, weight: Tensor) -> Tensor:
    """The derivative for the input, by ``of_part(grad_output, weight, geometry)``."""
    groups = {}
    for one in parts:
        result = of_part(*one.operands("input_grad", grad_output, weight), one.geometry)
        groups[one.input.start] = result if one.input.start not in groups else groups[one.input.start] + result
    return torch.cat([groups[start] for start in sorted(groups)], 1).contiguous(
        memory_format=memory_format(grad_output)
    )


def weight_grad(of_part: Callable[..., Tensor], parts: list[Part], grad_output: Tensor, input: Tensor) -> Tensor:
    """The derivative for the weight, by ``of_part(grad_output, input, geometry)``."""
    return torch.cat([of_part(*one.operands("weight_grad", grad_output, input), one.geometry) for one in parts])
