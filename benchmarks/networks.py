"""Networks with this library's operator and with the published one, on one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import acs_triton.models
from acs_triton.demo.timing import publish

NAMES = ("resnet18", "efficientnet_b0", "mobilenet_v3_large", "unet")

_KINDS = {
    "convolutions and products of matrices": ("conv", "acs", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "batch norm": ("batch_norm",),
    "activations": ("relu", "silu", "swish", "sigmoid", "clamp", "threshold"),
    "pooling and resampling": ("pool", "upsample"),
    "copies and fills": ("copy_", "fill_", "zero_", "cat", "clone", "contiguous"),
}


def in_channels(name: str) -> int:
    """Channels of the network's input."""
    return 1 if name == "unet" else 3


def pair(name: str) -> dict[str, nn.Module]:
    """The network with each operator, in training mode; they give the same output."""
    torch.manual_seed(0)
    if name == "unet":
        from acsconv.models import ACSUNet as PublishedUNet

        ours, published = acs_triton.models.ACSUNet(2), PublishedUNet(2)
        published.load_state_dict(ours.state_dict())
        return {"acsconv": published, "acs_triton": ours}
    import torchvision

    network = torchvision.models.get_model(name)
    published = _volume_pools(publish(deepcopy(network)))
    published.load_state_dict(network.state_dict())
    return {"acsconv": published, "acs_triton": acs_triton.convert(network)}


def _volume_pools(module: nn.Module) -> nn.Module:
    """Put 3D poolings in place of 2D ones, as ACSConv's converter does. Changes ``module`` and returns it."""
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.MaxPool3d(child.kernel_size, child.stride, child.padding))
        elif isinstance(child, nn.AdaptiveAvgPool2d):
            size = child.output_size
            setattr(module, name, nn.AdaptiveAvgPool3d(size if isinstance(size, int) else size[0]))
        else:
            _volume_pools(child)
    return module


def training_step(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward pass, a loss, and the gradients of all parameters."""
    model.train()

    def step():
        model.zero_grad()
        torch.manual_seed(0)  # one dropout mask for all
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    return step


def shares(name: str, size: int) -> Sequence[str]:
    """For each operator, one line on the kinds of operation that a training step's time goes to."""
    x, lines = torch.randn(1, in_channels(name), size, size, size), []
    for key, model in pair(name).items():
        step = training_step(model, x)
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        times = dict.fromkeys([*_KINDS, "other"], 0.0)
        for event in profiler.key_averages():
            times[_kind(event.key)] += event.self_cpu_time_total
        whole = sum(times.values())
        parts = ", ".join(f"{kind} {time / whole:.0%}" for kind, time in times.items())
        lines.append(f"{name} with {key}: {whole / 1e3:.0f} ms: {parts}")
    return lines


def _kind(event: str) -> str:
    names = ((kind, words) for kind, words in _KINDS.items() if any(word in event.lower() for word in words))
    return next(names, ("other", ()))[0]
