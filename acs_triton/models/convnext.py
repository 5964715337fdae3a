"""ConvNeXts (Liu et al., arXiv:2201.03545) of ACS layers, with the state-dict keys of the authors' 2D ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..operators import ACSConv


class LayerNorm(nn.LayerNorm):
    """Normalization over the channels of volumes ``(N, C, D, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Depthwise 7x7 ACS convolution, a perceptron in each voxel, and the shortcut, which may be all that is left.

    Args:
        dim: channels.
        drop_path: probability that a sample takes the shortcut only, while training.
        layer_scale_init_value: start of the scale of each channel; no scale where 0.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6):
        super().__init__()
        self.dwconv = ACSConv(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if layer_scale_init_value > 0 else None
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).movedim(1, -1))
        out = self.pwconv2(self.act(self.pwconv1(out)))
        if self.gamma is not None:
            out = self.gamma * out
        if self.training and self.drop_path:
            kept = 1 - self.drop_path
            out = out * (out.new_empty(len(out), 1, 1, 1, 1).bernoulli_(kept) / kept)
        return x + out.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """``(N, in_chans, D, H, W)`` to ``(N, num_classes)`` logits.

    ``load_state_dict`` takes the authors' checkpoints (their entry ``"model"``), ACSConv's, timm's and
    torchvision's.

    Args:
        in_chans: channels of the volumes.
        num_classes: outputs.
        depths: blocks in each of the four stages.
        dims: channels of each stage.
        drop_path_rate: ``drop_path`` of the last block; it rises linearly from 0 at the first one.
        layer_scale_init_value: of the blocks.
        head_init_scale: factor on the head's first weights.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
    ):
        super().__init__()
        stem = nn.Sequential(ACSConv(in_chans, dims[0], kernel_size=4, stride=4), LayerNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(LayerNorm(before, eps=1e-6), ACSConv(before, after, kernel_size=2, stride=2))
            )
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), layer_scale_init_value) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, dims[-1])``: the normalized mean of the last map."""
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm(x.mean((2, 3, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in [key for key in state_dict if key.startswith(prefix)]:
            value = state_dict.pop(key)
            name = key.removeprefix(prefix)
            for pattern, own in _OTHER_NAMES:
                name = re.sub(f"^{pattern}", own, name)
            name = re.sub(r"^features\.(\d+)", _torchvision_layer, name)
            state_dict[prefix + name] = value.flatten() if name.endswith("gamma") else value
        super()._load_from_state_dict(state_dict, prefix, *args)


_OTHER_NAMES = (
    # timm
    (r"stem\.", "downsample_layers.0."),
    (r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc", r"stages.\1.\2.pwconv"),
    (r"stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"head\.norm\.", "norm."),
    (r"head\.fc\.", "head."),
    # torchvision
    (r"(features\.\d+\.\d+)\.layer_scale", r"\1.gamma"),
    (r"(features\.\d+\.\d+)\.block\.0\.", r"\1.dwconv."),
    (r"(features\.\d+\.\d+)\.block\.2\.", r"\1.norm."),
    (r"(features\.\d+\.\d+)\.block\.3\.", r"\1.pwconv1."),
    (r"(features\.\d+\.\d+)\.block\.5\.", r"\1.pwconv2."),
    (r"classifier\.0\.", "norm."),
    (r"classifier\.2\.", "head."),
)


def _torchvision_layer(match: re.Match) -> str:
    """torchvision lists downsampling layers and stages in turn."""
    index = int(match[1])
    return f"{'stages' if index % 2 else 'downsample_layers'}.{index // 2}"


def _convnext(name: str, depths, dims, pretrained: bool = False, in_22k: bool = False, **options) -> ConvNeXt:
    network = ConvNeXt(depths=depths, dims=dims, **options)
    if in_22k and not pretrained:
        raise ValueError("in_22k=True chooses between pretrained weights: it needs pretrained=True")
    if pretrained:
        try:
            import timm
        except ImportError as error:
            raise ImportError("pretrained=True needs timm: pip install 'acs-triton[models]'") from error
        weights = timm.create_model(f"{name}.fb_in{'22k' if in_22k else '1k'}", pretrained=True).state_dict()
        if len(weights["head.fc.bias"]) != network.head.out_features:
            weights.update({"head.fc.weight": network.head.weight, "head.fc.bias": network.head.bias})
        network.load_state_dict(weights)
    return network


convnext_tiny = partial(_convnext, "convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768))
convnext_small = partial(_convnext, "convnext_small", (3, 3, 27, 3), (96, 192, 384, 768))
convnext_base = partial(_convnext, "convnext_base", (3, 3, 27, 3), (128, 256, 512, 1024))
convnext_large = partial(_convnext, "convnext_large", (3, 3, 27, 3), (192, 384, 768, 1536))
convnext_xlarge = partial(_convnext, "convnext_xlarge", (3, 3, 27, 3), (256, 512, 1024, 2048))
