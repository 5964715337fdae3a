"""A training step with this library's operator and with the published ACSConv's, in one network."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

import acs_triton

from ..operators import ACSConv
from .network import FeaturePyramid, Segmenter, classifier


def pad_inside(net: nn.Module) -> nn.Module:
    """Let EfficientNet-lite0's convolutions pad themselves, both sides alike; changes ``net`` and returns it.

    Its layers of stride 2 pad one side more than the other, in an operation of its own. There
    the published operator must crop, and when it crops it fails on depthwise convolutions.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.static_padding = nn.Identity()
            layer.padding = tuple(size // 2 for size in layer.kernel_size)
    return net


def publish(module: nn.Module) -> nn.Module:
    """Put ACSConv's layers, newly initialised, in place of 2D and ACS convolutions, and 3D batch norms of 2D ones.

    This is what ACSConv's converter does. Changes ``module`` and returns it.
    """
    from acsconv.operators import ACSConv as Published

    for name, child in module.named_children():
        if isinstance(child, (nn.Conv2d, ACSConv)):
            kernel, stride, padding = child.kernel_size[0], child.stride[0], child.padding[0]
            arguments = (child.in_channels, child.out_channels, kernel, stride, padding)
            child = Published(*arguments, groups=child.groups, bias=child.bias is not None)
        elif isinstance(child, nn.BatchNorm2d):
            child = nn.BatchNorm3d(child.num_features, child.eps, child.momentum)
        else:
            publish(child)
        setattr(module, name, child)
    return module


def pair() -> tuple[Segmenter, Segmenter]:
    """One network with one set of weights, with this library's operator and with the published one."""
    ours, published = (FeaturePyramid(pad_inside(classifier(pretrained=True))) for _ in range(2))
    ours, published = Segmenter(acs_triton.convert(ours)), publish(Segmenter(published))
    published.load_state_dict(ours.state_dict())
    return ours, published


class Comparison(NamedTuple):
    """Seconds of a training step with each operator, and how far their first losses are apart."""

    ours: list[float]
    published: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        """Published time over ours, both medians."""
        return median(self.published) / median(self.ours)


def compare(ours: Callable[[], float], published: Callable[[], float], repeats: int) -> Comparison:
    """Time two training steps, which return their loss, in turn; the first turn is not counted."""
    seconds, losses = ([], []), ([], [])
    for turn in range(1 + repeats):
        for which, step in enumerate((ours, published)):
            torch.manual_seed(turn)  # one dropout mask for both
            start = time.perf_counter()
            losses[which].append(step())
            seconds[which].append(time.perf_counter() - start)
    return Comparison(seconds[0][1:], seconds[1][1:], abs(losses[0][0] - losses[1][0]))
