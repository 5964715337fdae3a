"""The layers whose speed is compared, and the implementations that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import reference
from acs_triton.operators import ACSConv, SoftACSConv

LAYOUTS = {"ncdhw": torch.contiguous_format, "channels_last": torch.channels_last_3d}


@dataclass(frozen=True)
class LayerCase:
    """One layer with "same" padding on cubes of ``size`` voxels a side; ``soft``: a Soft ACS layer."""

    in_channels: int
    out_channels: int
    kernel: int
    size: int
    stride: int = 1
    batch: int = 1
    groups: int = 1
    soft: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels}", f"k{self.kernel}"]
        parts += [f"s{self.stride}"] * (self.stride > 1) + ["depthwise"] * (self.groups > 1) + ["soft"] * self.soft
        return " ".join([*parts, f"{self.size}^3"] + [f"b{self.batch}"] * (self.batch > 1))

    @property
    def slug(self) -> str:
        """The name in letters, digits and underscores, for a test's name."""
        return self.name.replace("->", "_").replace("^3", "").replace(" ", "_")

    @property
    def is_stem(self) -> bool:
        """Whether the input is an image, which needs no gradient."""
        return self.in_channels <= 4

    def multiply_adds(self, passes: int = 1) -> int:
        """Useful multiply-adds of the forward pass, times ``passes``; a Soft layer has 19 merged taps for k = 3."""
        positions = self.batch * ((self.size + self.stride - 1) // self.stride) ** 3
        taps = 19 if self.soft else self.kernel**2
        return passes * positions * self.out_channels * self.in_channels // self.groups * taps

    def input(self, layout: torch.memory_format = torch.contiguous_format, **to) -> Tensor:
        """A random input; it asks for a gradient unless it is an image."""
        x = torch.randn(self.batch, self.in_channels, *(self.size,) * 3, **to).contiguous(memory_format=layout)
        return x.requires_grad_(not self.is_stem)


LAYERS = (
    LayerCase(3, 64, kernel=7, stride=2, size=64),
    LayerCase(16, 16, kernel=3, size=64),
    LayerCase(32, 32, kernel=3, size=48),
    LayerCase(64, 64, kernel=3, size=24, batch=2),
    LayerCase(64, 128, kernel=3, stride=2, size=24, batch=2),
    LayerCase(128, 128, kernel=3, size=12),
    LayerCase(256, 256, kernel=3, size=8),
    LayerCase(64, 256, kernel=1, size=24),
    LayerCase(96, 96, kernel=3, size=32, groups=96),
    LayerCase(48, 48, kernel=5, stride=2, size=32, groups=48),
    LayerCase(96, 96, kernel=7, size=24, groups=96),
    LayerCase(32, 32, kernel=3, size=48, soft=True),
    LayerCase(64, 64, kernel=3, size=24, soft=True),
)


class _Reference(nn.Module):
    """The written-out definition, on the weights of one of our layers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        self.mix = getattr(layer, "soft_w_core", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is None:
            return reference.acs_conv3d(x, self.weight, self.bias, **self.options)
        return reference.soft_acs_conv3d(x, self.weight, self.mix.softmax(-1), self.bias, **self.options)


def _arguments(case: LayerCase) -> tuple[tuple, dict]:
    return (case.in_channels, case.out_channels, case.kernel, case.stride, case.kernel // 2), {"groups": case.groups}


def _ours(case: LayerCase) -> nn.Module:
    args, options = _arguments(case)
    return (SoftACSConv if case.soft else ACSConv)(*args, **options)


def _published(case: LayerCase) -> nn.Module:
    from acsconv import operators as published

    weights = _ours(case).state_dict()
    args, options = _arguments(case)
    layer = (published.SoftACSConv if case.soft else published.ACSConv)(*args, **options)
    layer.load_state_dict(weights)
    return layer


def _conv3d(case: LayerCase) -> nn.Module:
    args, options = _arguments(case)
    return nn.Conv3d(*args, **options)


IMPLEMENTATIONS: dict[str, Callable[[LayerCase], nn.Module]] = {
    "acs_triton": _ours,
    "acsconv": _published,
    "reference": lambda case: _Reference(_ours(case)),
    "reference_compiled": lambda case: torch.compile(_Reference(_ours(case))),
    "conv3d": _conv3d,
}
"""Builders by name. ``acsconv`` is the published package; ``conv3d`` has three times the weights and the work."""


def build(implementation: str, case: LayerCase) -> nn.Module:
    """A layer; those of one case have one set of weights, but for ``conv3d``."""
    torch.manual_seed(0)
    return IMPLEMENTATIONS[implementation](case)
