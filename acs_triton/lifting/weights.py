"""Kernels of a 2D network for a lifted one: inflated, for other input channels, from checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .options import Lift

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def inflate(weight: Tensor, lift: Lift, transposed_stride: int | None = None) -> Tensor:
    """A dense kernel that does to equal slices what the 2D kernel does to each (I3D).

    ``"repeat"``: repeated and divided by the number of taps that reach an output; ``"centre"``:
    in the middle, zeros around. For a transposed convolution ``transposed_stride`` is its stride.
    """
    taps = min(weight.shape[-2:])
    step = transposed_stride or 1
    if lift.inflation == "centre":
        first = (taps - step) // 2
        share = torch.zeros(taps, dtype=weight.dtype, device=weight.device)
        share[first : first + step] = 1
    else:
        share = torch.full((taps,), step / taps, dtype=weight.dtype, device=weight.device)
    solid = weight.unsqueeze(2) * share.view(1, 1, -1, 1, 1)
    return solid.movedim(2, lift.axis)


def inflate_for(module: nn.Module, weight: Tensor) -> Tensor:
    """The dense kernel of a convolution module for its 2D one."""
    stride = min(module.stride) if isinstance(module, nn.ConvTranspose2d) else None
    return inflate(weight, module._acs_lift, stride).contiguous()


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """A kernel for another number of input channels: RGB summed for one, repeated and scaled for several."""
    own = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(channels, device=weight.device) % own] * (own / channels)


def adapt_first_convolution(model: nn.Module, channels: int) -> nn.Module | None:
    """Give the first convolution ``channels`` input channels; returns it, None where it has them.

    Raises:
        ValueError: no convolution, a grouped one, or a computed kernel.
    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"in_channels={channels}: the network has no Conv2d to adapt")
    if first.in_channels == channels:
        return None
    weight = first._parameters.get("weight")
    if first.groups != 1 or weight is None or weight.dim() != 4:
        raise ValueError(f"in_channels={channels}: the first convolution is grouped or has a computed kernel: {first}")
    with torch.no_grad():
        first.weight = nn.Parameter(with_channels(weight, channels), requires_grad=weight.requires_grad)
    first.in_channels = channels
    return first


def add_parameters(module: nn.Module, inflated: dict) -> None:
    """The parameters that a kind adds (soft) or replaces (3d); ``inflated`` keeps tied kernels tied."""
    if not isinstance(module, CONVOLUTIONS):
        return
    kind, weight = module._acs_lift.kind, module._parameters.get("weight")
    if kind == "soft" and "soft_w_core" not in module._parameters:
        reference = module.weight
        start = torch.zeros(module.out_channels, 3, dtype=reference.dtype, device=reference.device)
        module.soft_w_core = nn.Parameter(start, requires_grad=reference.requires_grad)
    elif kind == "3d" and weight is not None and weight.dim() == 4:
        # Computed kernels (parametrizations) are inflated when they are used.
        if weight not in inflated:
            with torch.no_grad():
                inflated[weight] = nn.Parameter(inflate_for(module, weight), requires_grad=weight.requires_grad)
        module.weight = inflated[weight]


def is_inflated(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, CONVOLUTIONS) and isinstance(weight, Tensor) and weight.dim() == 5


def adapt_checkpoint(module: nn.Module, state_dict: dict, prefix: str) -> None:
    """Make the entries of a 2D checkpoint, or of one from ACSConv's converters, fit ``module``."""
    if not isinstance(module, CONVOLUTIONS):
        return
    core = module._parameters.get("soft_w_core")
    given, weight = state_dict.get(prefix + "weight"), module._parameters.get("weight")
    if core is not None and given is not None:
        state_dict.setdefault(prefix + "soft_w_core", core.detach())
    if given is None or weight is None:
        return
    if given.dim() == 5 and weight.dim() == 4:  # Conv2_5d
        flat = [given.squeeze(axis) for axis in (2, 3, 4) if given.shape[axis] == 1]
        given = next((kernel for kernel in flat if kernel.shape[2:] == weight.shape[2:]), given)
    if module._acs_lift.adapts_channels and given.dim() == 4 and given.shape[1] != weight.shape[1]:
        given = with_channels(given, weight.shape[1])
    if given.dim() == 4 and weight.dim() == 5:
        given = inflate_for(module, given)
    state_dict[prefix + "weight"] = given
