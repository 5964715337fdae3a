"""A U-Net for volumes: a lifted 2D encoder with its weights, and a decoder of ACS layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..operators import ACSConv, Conv2_5d, SoftACSConv
from .pyramid import Pyramid, lift_pyramid

LAYERS = {
    "acs": ACSConv,
    "soft": SoftACSConv,
    "mean": lambda *args, **kwargs: SoftACSConv(*args, mean=True, **kwargs),
    "2.5d": Conv2_5d,
    "3d": nn.Conv3d,
}
"""The layer of each kind of :func:`acs_triton.convert`, with the arguments of ``nn.Conv3d``."""

NORMS = {"batch": nn.BatchNorm3d, "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True)}


class Up(nn.Module):
    """Enlarge a map to the size of the next larger one, append that, and convolve twice.

    Shape: ``(N, in_channels, D', H', W')`` and, with ``skip_channels``, ``(N, skip_channels, D, H, W)``,
    to ``(N, out_channels, D, H, W)``.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, kind: str, norm: str):
        super().__init__()
        layers = []
        for channels in (in_channels + skip_channels, out_channels):
            layers += [
                LAYERS[kind](channels, out_channels, kernel_size=3, padding=1, bias=False),
                NORMS[norm](out_channels),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        x = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
        return self.layers(x if skip is None else torch.cat([x, skip], 1))


class LiftedUNet(nn.Module):
    """U-Net for the segmentation of volumes whose encoder is a 2D network with its weights.

    The encoder is lifted (:func:`acs_triton.convert`); the decoder is made of ACS layers, new. At
    each size of the encoder's maps the decoder enlarges, appends the map and convolves twice; the
    last step, to the size of the volume, has no map to append unless the encoder gives one.

    Args:
        encoder: a timm name, or a 2D network, with the weights that it has: a timm
            ``features_only`` network, an encoder of segmentation-models-pytorch, a torchvision
            classifier (its head is dropped), or any that :class:`Pyramid` takes. It is changed in
            place. Its normalization layers stay.
        in_channels: channels of the volumes. The encoder's first kernels are adapted: summed for
            one channel, repeated and scaled for several; 2D checkpoints still load.
        classes: channels of the output.
        kind: of the encoder's and the decoder's convolutions, as in :func:`acs_triton.convert`.
        pretrained: with a timm name, load its published weights (a download).
        decoder_channels: of each step of the decoder, the smallest size first, one for each map of
            the encoder, less one if its largest map has the size of the image. By default half
            of the encoder's channels, between 16 and 256.
        norm: ``"batch"`` or ``"instance"`` normalization in the decoder.
        deep_supervision: number of smaller outputs given besides the full one in training mode.
        spacing: size ``(D, H, W)`` of a voxel, in any unit, where slices are thicker than
            pixels: the depth is not halved before the pixels are as large (within a factor of two).
        rules: options for single layers of the encoder, as in :func:`acs_triton.convert`; the
            names are those of ``unet.encoder.named_modules()``.

    Shape: ``(N, in_channels, D, H, W)`` of any size to logits ``(N, classes, D, H, W)``. In
    training mode with ``deep_supervision=n``, a list of ``n + 1``: the full one first, then those at
    the sizes of the decoder's steps before, as MONAI's ``DeepSupervisionLoss`` takes them.

    Attributes:
        encoder: the lifted :class:`Pyramid`; ``encoder.network`` is the 2D network.
        keep_depth: halvings of the plane that leave the depth as it is.

    Raises:
        ValueError: an argument does not fit, or the encoder gives no maps at falling sizes.
        ImportError: an extra is missing; the message names it.

    >>> import torchvision
    >>> unet = LiftedUNet(torchvision.models.resnet18(), in_channels=1, classes=4).eval()
    >>> unet(torch.rand(1, 1, 32, 64, 64)).shape
    torch.Size([1, 4, 32, 64, 64])
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        in_channels: int = 1,
        classes: int = 2,
        *,
        kind: str = "acs",
        pretrained: bool = False,
        decoder_channels: Sequence[int] | None = None,
        norm: str = "batch",
        deep_supervision: int = 0,
        spacing: Sequence[float] | None = None,
        rules: Mapping | Callable | None = None,
    ):
        super().__init__()
        for name, value, choices in (("kind", kind, LAYERS), ("norm", norm, NORMS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("classes", classes, 1),
            ("deep_supervision", deep_supervision, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if pretrained and not isinstance(encoder, str):
            raise ValueError("pretrained=True needs the name of a timm network; a module keeps the weights it has")
        self.keep_depth = 0 if spacing is None else _halvings_to_cubes(spacing)
        network = _named(encoder, pretrained) if isinstance(encoder, str) else encoder
        self.encoder = lift_pyramid(Pyramid(network), kind, in_channels, rules, self.keep_depth)
        *skips, deepest = self.encoder.channels
        if self.encoder.strides[0] > 1:
            skips = [0, *skips]
        if decoder_channels is None:
            decoder_channels = [min(256, max(16, (skip or skips[1] // 2) // 2)) for skip in reversed(skips)]
        if len(decoder_channels) != len(skips):
            raise ValueError(
                f"decoder_channels must have {len(skips)} entries for maps of strides {self.encoder.strides}, "
                f"got {decoder_channels!r}"
            )
        if deep_supervision >= len(skips):
            raise ValueError(f"deep_supervision must be less than the {len(skips)} steps, got {deep_supervision}")
        self.ups = nn.ModuleList()
        for skip, channels in zip(reversed(skips), decoder_channels, strict=True):
            self.ups.append(Up(deepest, skip, channels, kind, norm))
            deepest = channels
        self.heads = nn.ModuleList(
            LAYERS[kind](channels, classes, kernel_size=1)
            for channels in reversed(decoder_channels[-1 - deep_supervision :])
        )

    def forward(self, volume: Tensor) -> Tensor | list[Tensor]:
        if volume.dim() != 5:
            raise ValueError(f"the input must be volumes (N, C, D, H, W), got shape {tuple(volume.shape)}")
        *skips, x = self.encoder(volume)
        if len(skips) < len(self.ups):
            skips = [None, *skips]
        steps = []
        for up, skip in zip(self.ups, reversed(skips), strict=True):
            x = up(x, skip, volume.shape[2:] if skip is None else skip.shape[2:])
            steps.append(x)
        if not self.training or len(self.heads) == 1:
            return self.heads[0](x)
        return [head(step) for head, step in zip(self.heads, steps[: -len(self.heads) - 1 : -1], strict=True)]


def _named(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"encoder {name!r} needs timm: pip install 'acs-triton[models]'") from error
    return timm.create_model(name, features_only=True, pretrained=pretrained)


def _halvings_to_cubes(spacing: Sequence[float]) -> int:
    """How often the plane is halved before the pixels are about as large as the slices are thick."""
    spacing = tuple(spacing)
    if len(spacing) != 3 or not all(size > 0 for size in spacing):
        raise ValueError(f"spacing must be three positive sizes (D, H, W), got {spacing!r}")
    ratio = spacing[0] / min(spacing[1:])
    if ratio <= 0.5 or max(spacing[1:]) / min(spacing[1:]) >= 2:
        raise ValueError(f"spacing must have its coarse axis first, (D, H, W) with H and W alike, got {spacing!r}")
    return int(log2(max(1, ratio)))
