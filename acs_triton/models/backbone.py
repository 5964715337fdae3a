"""What ACSConv's networks share: backbones that take 2D checkpoints, and their two heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layout import channels_last
from ..operators import ACSConv


class Backbone(nn.Module):
    """A network without a head; gives ``(deepest, middle, full)`` feature maps.

    Its ``load_state_dict`` takes its own checkpoints, ACSConv's, and those of torchvision's 2D network
    of the same name, whose head it leaves out.

    Attributes:
        channels: of the three maps.
    """

    channels: tuple[int, int, int]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        renamed = self._from_2d(given)
        if renamed is not None:
            for key in given:
                del state_dict[prefix + key]
            state_dict.update({prefix + key: value for key, value in renamed.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _from_2d(self, given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """A 2D checkpoint under this network's keys; None if ``given`` is something else.

        Both list their tensors in one order, the 2D one with its head at the end.
        """
        own = self.state_dict()
        counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
        names = [key for key in own if key not in counters]
        given = {key: value for key, value in given.items() if not key.endswith("num_batches_tracked")}
        body, head = list(given.items())[: len(names)], list(given)[len(names) :]
        if (
            given.keys() == set(names)
            or len(body) != len(names)
            or not all(key.startswith(_HEADS) for key in head)
            or any(own[name].shape != value.shape for name, (_, value) in zip(names, body, strict=True))
        ):
            return None
        return counters | {name: value for name, (_, value) in zip(names, body, strict=True)}


_HEADS = ("fc.", "classifier.", "features.norm5.")
"""What torchvision's classifiers have behind their last feature map."""


def load_imagenet(backbone: nn.Module, name: str) -> None:
    """Load torchvision's first ImageNet weights of the 2D network ``name`` (a download)."""
    backbone.load_state_dict(torchvision_models().get_model_weights(name).IMAGENET1K_V1.get_state_dict())


def torchvision_models():
    """``torchvision.models``, or an error that names the extra."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("pretrained=True needs torchvision: pip install 'acs-triton[models]'") from error
    return models


def initialise(network: nn.Module) -> None:
    """Normal kernels of variance ``2 / (k * k * O)``, as ACSConv's ResNet and VGG draw them, and neutral norms."""
    for module in network.modules():
        if isinstance(module, ACSConv):
            nn.init.normal_(module.weight, std=(2 / (module.weight[0, 0].numel() * module.out_channels)) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm3d):
            module.reset_parameters()


def backbone_named(backbones: Mapping[str, Callable], name: str, pretrained: bool) -> Backbone:
    if name not in backbones:
        raise ValueError(f"backbone must be one of {', '.join(backbones)}, got {name!r}")
    return backbones[name](pretrained=pretrained)


class FCNHead(nn.Sequential):
    """``(N, in_channels, D, H, W)`` to ``(N, channels, D, H, W)`` logits."""

    def __init__(self, in_channels: int, channels: int):
        inner = in_channels // 4
        super().__init__(
            ACSConv(in_channels, inner, 3, padding=1, bias=False),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            ACSConv(inner, channels, 1),
        )


class FCN(nn.Module):
    """Segmentation: the deepest map, enlarged twice and joined with the larger ones.

    Shape: ``(N, 3, D, H, W)`` to ``(N, num_classes, D, H, W)`` logits.

    Args:
        backbone: has no head yet.
        num_classes: channels of the output.
        widths: channels after each of the two joints.
    """

    def __init__(self, backbone: Backbone, num_classes: int, widths: tuple[int, int]):
        super().__init__()
        self.backbone = backbone
        deepest, middle, full = backbone.channels
        self.conv1 = ACSConv(middle + deepest, widths[0], kernel_size=1, bias=False)
        self.conv2 = ACSConv(full + widths[0], widths[1], kernel_size=1, bias=False)
        self.classifier = FCNHead(widths[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x, middle, full = self.backbone(channels_last(x))
        for skip, joint in ((middle, self.conv1), (full, self.conv2)):
            x = joint(torch.cat([skip, F.interpolate(x, size=skip.shape[2:], mode="trilinear")], 1))
        return self.classifier(x).contiguous()


class Classifier(nn.Module):
    """Classification: the mean of the deepest map, and a linear layer.

    Shape: ``(N, 3, D, H, W)`` to ``(N, num_classes)`` logits.
    """

    def __init__(self, backbone: Backbone, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.channels[0], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(channels_last(x))[0].mean((2, 3, 4)))
