"""Mixed views (Soft ACS) as a sum of convolutions in one view each, where no kernel takes merged taps.

Two sums are the same: that of the three views, and that of their planes without the positions that an
earlier one has (19 taps instead of 27 for 3x3 kernels on one grid: two planes meet in a line of
three, so the axial plane takes all that lies in it, the coronal one has two rows left, and the
sagittal one its four corners).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

from ..geometry import PLANE_AXES, Geometry
from ..merging import merge, unmerge


@dataclass(frozen=True)
class Planes:
    """A sum that is the mix.

    Attributes:
        planes: number of a plane's first tap, and its convolution.
        merged: whether taps are counted among the merged ones, or else among ``(view, u, v)``.
    """

    planes: tuple[tuple[int, Geometry], ...]
    merged: bool

    def weights(self, weight: Tensor, geometry: Geometry) -> list[Tensor]:
        """The planes' weights ``(O, C/groups, u, v)``, of one ``(O, C/groups, 3, ku, kv)``."""
        taps = merge(weight, geometry) if self.merged else weight.flatten(2)
        sizes = [plane.kernel_size for _, plane in self.planes]
        return [
            taps[:, :, first : first + prod(size)].unflatten(2, size)
            for (first, _), size in zip(self.planes, sizes, strict=True)
        ]

    def gradient(self, gradients: list[Tensor], geometry: Geometry) -> Tensor:
        """The transpose of :meth:`weights`."""
        taps = torch.cat([gradient.flatten(2) for gradient in gradients], 2)
        return unmerge(taps, geometry) if self.merged else taps.unflatten(2, (3, *geometry.kernel_size))


@lru_cache(maxsize=1024)
def views(geometry: Geometry, out_channels: int) -> Planes:
    """The three views."""
    taps = prod(geometry.kernel_size)
    return Planes(tuple((view * taps, geometry.one_view(view, out_channels)) for view in range(3)), merged=False)


@lru_cache(maxsize=1024)
def fewest_taps(geometry: Geometry, out_channels: int) -> Planes:
    """The planes without each other's positions; the views, where what is left of one is not evenly spaced."""
    planes, first = [], 0
    for view in range(3):
        taps = list(product(*map(range, geometry.kernel_size)))
        left = [tap for tap, number in zip(taps, geometry.merged.number[view], strict=True) if number >= first]
        spans = [sorted({tap[i] for tap in left}) for i in (0, 1)]
        steps = [{b - a for a, b in pairwise(span)} or {1} for span in spans]
        if len(left) != prod(map(len, spans)) or any(len(step) > 1 for step in steps):
            return views(geometry, out_channels)
        if left:
            start, dilation = list(geometry.start[view]), list(geometry.dilation[view])
            for axis, span, (step,) in zip(PLANE_AXES[view], spans, steps, strict=True):
                start[axis] += span[0] * dilation[axis]
                dilation[axis] *= step
            plane = replace(
                geometry.one_view(view, out_channels),
                kernel_size=tuple(map(len, spans)),
                start=tuple(tuple(start) if v == view else one for v, one in enumerate(geometry.start)),
                dilation=tuple(tuple(dilation) if v == view else one for v, one in enumerate(geometry.dilation)),
            )
            planes.append((first, plane))
        first += len(left)
    return Planes(tuple(planes), merged=True)


def conv(one_view: Callable[..., Tensor], planes: Planes, input, weight, bias, geometry: Geometry) -> Tensor:
    """The convolution, by ``one_view(input, weight, bias, geometry)``."""
    result = None
    for (_, plane), kernel in zip(planes.planes, planes.weights(weight, geometry), strict=True):
        part = one_view(input, kernel, bias if result is None else None, plane)
        result = part if result is None else result.add_(part)
    return result


def input_grad(one_view: Callable[..., Tensor], planes: Planes, grad_output, weight, geometry: Geometry) -> Tensor:
    """The derivative for the input, by ``one_view(grad_output, weight, geometry)``."""

    def both(grad_output, input, weight, geometry):
        return one_view(grad_output, weight, geometry), None

    return gradients(both, planes, grad_output, None, weight, geometry)[0]


def weight_grad(one_view: Callable[..., Tensor], planes: Planes, grad_output, input, geometry: Geometry) -> Tensor:
    """The derivative for the weight, by ``one_view(grad_output, input, geometry)``."""

    def both(grad_output, input, weight, geometry):
        return None, one_view(grad_output, input, geometry)

    return gradients(both, planes, grad_output, input, None, geometry)[1]


def gradients(
    one_view: Callable[..., tuple[Tensor | None, Tensor | None]],
    planes: Planes,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    geometry: Geometry,
) -> tuple[Tensor | None, Tensor | None]:
    """The derivatives for input and weight, by ``one_view(grad_output, input, weight, geometry)``.

    The input's needs ``weight`` and the weight's needs ``input``; None where that is None.
    """
    kernels = [None] * len(planes.planes) if weight is None else planes.weights(weight, geometry)
    for_input, for_weights = None, []
    for (_, plane), kernel in zip(planes.planes, kernels, strict=True):
        part, for_weight = one_view(grad_output, input, kernel, plane)
        for_weights.append(for_weight)
        for_input = part if for_input is None else for_input.add_(part)
    return for_input, None if input is None else planes.gradient(for_weights, geometry)
