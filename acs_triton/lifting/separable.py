"""Pooling and resampling of volumes by their 2D forms, which keep channels-last memory.

PyTorch's ``avg_pool3d``, and the gradient of its nearest-neighbour resampling in 3D, return plain
memory whatever they are given, and every layer after them would copy. Both are separable: the depth
and the plane are done one after the other, on views of the volume.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def avg_pool3d(
    volume: Tensor,
    kernel,
    stride,
    padding,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """Averages over ``(N, C, D, H, W)``; ``divisor``, where given, is a plane's, and depth's is then ``kernel[0]``."""
    options = ceil_mode, count_include_pad
    planes = _on_planes(F.avg_pool2d, volume, kernel[1:], stride[1:], padding[1:], *options, divisor)
    if kernel[0] == stride[0] == 1 and padding[0] == 0:
        return planes
    deep = (kernel[0], 1), (stride[0], 1), (padding[0], 0)
    return _on_depth(F.avg_pool2d, planes, *deep, *options, divisor and kernel[0])


def resize_nearest(volume: Tensor, mode: str, size=None, scale_factor=None) -> Tensor:
    """``torch.nn.functional.interpolate`` of ``(N, C, D, H, W)``, for ``mode="nearest"`` and ``"nearest-exact"``."""
    if size is None:
        deep = _on_depth(F.interpolate, volume, scale_factor=(scale_factor[0], 1), mode=mode)
        return _on_planes(F.interpolate, deep, scale_factor=scale_factor[1:], mode=mode)
    plane = volume.shape[3] * volume.shape[4]
    deep = _on_depth(F.interpolate, volume, size=(size[0], plane), mode=mode)
    return _on_planes(F.interpolate, deep, size=size[1:], mode=mode)


def _on_planes(function, volume: Tensor, *args, **kwargs) -> Tensor:
    """A 2D operation on the slices along depth."""
    planes = function(volume.movedim(2, 1).flatten(0, 1), *args, **kwargs)
    return planes.unflatten(0, (volume.shape[0], volume.shape[2])).movedim(1, 2)


def _on_depth(function, volume: Tensor, *args, **kwargs) -> Tensor:
    """A 2D operation on ``(depth, the plane's positions)`` that leaves the latter alone."""
    # With the channels last, so that flattening keeps the strides that tell so, of a single volume too.
    lines = volume.movedim(1, -1).flatten(2, 3).movedim(-1, 1)
    return function(lines, *args, **kwargs).movedim(1, -1).unflatten(2, volume.shape[3:]).movedim(-1, 1)
