"""What plain convolutions an ACS convolution consists of, and how tensors are fitted to each.

A *piece* is a part of the output channels that one convolution computes: those of one view, or
fewer where the groups do not line up with the views. Two forms compute it:

* the *volume*: ``conv3d`` with a kernel of extent 1 on the through-plane axis;
* the *slices*: ``conv2d`` with the through-plane axis in the batch.

In both, a convolution's own symmetric padding says where it samples, wherever that is possible;
crops are views, and a padded copy is made for the rest only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import PLANE_AXES, Geometry, Triple, conv_size, reach
from ..layout import empty, write

_CUT_CHANNELS, _CUT_POSITIONS = 16, 2**13
_STRIP = 3


@dataclass(frozen=True)
class Fit:
    """How the last axes of a tensor are padded, so that a plain convolution reads the right positions.

    ``padding`` is the convolution's own. ``low`` and ``high`` are positions to add (or, where
    negative, to cut off) before it. ``outside``: no sample lies inside the tensor.
    """

    padding: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    outside: bool

    @cached_property
    def exact(self) -> bool:
        """Whether tensors are read as they are."""
        return not any(self.low + self.high)

    def apply(self, tensor: Tensor) -> Tensor:
        """``tensor`` as the convolution is to read it."""
        if self.exact:
            return tensor
        first = tensor.dim() - len(self.low)
        for axis, (low, high) in enumerate(zip(self.low, self.high, strict=True), first):
            if low < 0 or high < 0:
                cut = max(-low, 0)
                tensor = tensor.narrow(axis, cut, tensor.shape[axis] - cut - max(-high, 0))
        if max(self.low + self.high) > 0:
            tensor = F.pad(tensor, _pads([max(n, 0) for n in self.low], [max(n, 0) for n in self.high]))
        return tensor

    def undo(self, gradient: Tensor) -> Tensor:
        """The gradient of :meth:`apply`: what was added is cut off, what was cut off is zero."""
        if self.exact:
            return gradient
        return F.pad(gradient, _pads([-n for n in self.low], [-n for n in self.high]))

    def size(self, size) -> list[int]:
        """The size of :meth:`apply`'s result."""
        return [n + low + high for n, low, high in zip(size, self.low, self.high, strict=True)]


def _pads(low, high) -> list[int]:
    return [pad for pair in zip(reversed(low), reversed(high), strict=True) for pad in pair]


def _fit(start, size, out, stride, extent, dilation, pads_small_inputs: bool = True, pads: bool = True) -> Fit:
    """``pads``: whether the convolution may itself pad; ``pads_small_inputs``: an axis that the kernel spans, too."""
    axes = range(len(start))
    padding, low, high, outside = [0 for _ in axes], [0 for _ in axes], [0 for _ in axes], False
    for a in axes:
        reach = (extent[a] - 1) * dilation[a] + 1
        last = start[a] + (out[a] - 1) * stride[a] + reach - 1
        outside |= start[a] >= size[a] or last < 0
        own = start[a] <= 0 and conv_size(size[a], extent[a], stride[a], -start[a], -start[a], dilation[a]) == out[a]
        if own and pads and (pads_small_inputs or reach < size[a]):
            padding[a] = -start[a]
        else:
            low[a], high[a] = -start[a], last + 1 - size[a]
    return Fit(tuple(padding), tuple(low), tuple(high), outside)


@dataclass(frozen=True)
class Slices:
    """A piece on slices: the ``count`` output planes from ``first`` on whose samples lie inside the input.

    Output plane ``first + i`` reads input plane ``position + i * step``.

    Attributes:
        fit, weight_fit: of images read, for the convolution and for the gradient of its kernel.
        mirrored: the classes of positions in an image; one at stride 1, none where nothing is read.
        strips: parts of the kernel, no wider than three, and images read fitted to the gradient of each.
    """

    axis: int
    first: int
    count: int
    position: int
    step: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    fit: Fit
    weight_fit: Fit
    mirrored: tuple[Mirrored, ...]
    strips: tuple[tuple[slice, Fit], ...]

    def parts(self, tensor: Tensor, most: int) -> list[Slices]:
        """The same slices in runs that read at most ``most`` bytes of ``tensor`` each, or one plane a sample."""
        plane = tensor.numel() // max(tensor.shape[self.axis + 2], 1) * tensor.element_size()
        each = max(1, most // max(plane, 1))
        return [
            replace(
                self,
                first=self.first + done,
                count=min(each, self.count - done),
                position=self.position + done * self.step,
            )
            for done in range(0, self.count, each)
        ]

    def planes_of_input(self, tensor: Tensor) -> Tensor:
        """``(N, C, D, H, W)`` to the planes read, ``(N, count, C, U, V)``; a view."""
        tensor = tensor.narrow(self.axis + 2, self.position, (self.count - 1) * self.step + 1)
        planes = tensor.movedim(self.axis + 2, 1)
        return planes[:, :: self.step] if self.step > 1 else planes

    def of_input(self, tensor: Tensor) -> Tensor:
        """The planes read as a batch ``(N * count, C, U, V)`` in channels-last memory."""
        return _batch(self.planes_of_input(tensor))

    def of_output(self, tensor: Tensor) -> Tensor:
        """The planes computed as a batch ``(N * count, C, U, V)`` in channels-last memory."""
        return _batch(tensor.narrow(self.axis + 2, self.first, self.count).movedim(self.axis + 2, 1))


def is_batch(planes: Tensor) -> bool:
    """Whether planes ``(N, count, C, U, V)`` are a batch of images in channels-last memory as they lie."""
    return planes.movedim(2, -1).is_contiguous()


def _batch(planes: Tensor) -> Tensor:
    if is_batch(planes):
        return planes.flatten(0, 1)
    samples, count, *image = planes.shape
    batch = empty(planes, (samples * count, *image), torch.channels_last)
    write(batch.unflatten(0, (samples, count)).transpose(1, 2), planes.transpose(1, 2))
    return batch


@dataclass(frozen=True)
class Mirrored:
    """Input positions that the same taps reach: their gradient is one convolution of the output's gradient, mirrored.

    At stride 1 all positions; otherwise every axis falls into as many classes as its stride.

    Attributes:
        positions: the input positions.
        taps: the kernel's taps that reach them.
        dilation: of those taps on the output's gradient.
        fit: of the output's gradient.
    """

    positions: tuple[slice, slice, slice]
    taps: tuple[slice, slice, slice]
    dilation: Triple
    fit: Fit


def _mirrored(*where: Triple) -> tuple[Mirrored, ...]:
    """The classes of input positions that samples reach; arguments as :func:`_fit`'s."""
    out, classes = where[2], []
    for axes in itertools.product(*(_axis_classes(*axis) for axis in zip(*where, strict=True))):
        positions, taps, start, count, extent, dilation = zip(*axes, strict=True)
        fit = _fit(start, out, count, (1,) * len(start), extent, dilation)
        if not fit.outside:
            classes.append(Mirrored(positions, taps, dilation, fit))
    return tuple(classes)


def _axis_classes(start: int, size: int, out: int, stride: int, extent: int, dilation: int):
    """Positions, taps, and the mirrored convolution's start, output size, extent and dilation, class by class."""
    every = stride // gcd(stride, dilation)  # taps so far apart reach the same class
    for first_tap in range(min(every, extent)):
        shift, position = divmod(start + first_tap * dilation, stride)
        taps, count = len(range(first_tap, extent, every)), len(range(position, size, stride))
        if count:
            apart = dilation * every // stride
            mirrored_start = -shift - (taps - 1) * apart
            yield slice(position, None, stride), slice(first_tap, None, every), mirrored_start, count, taps, apart


@dataclass(frozen=True)
class Piece:
    """What one convolution computes: output channels ``[first, end)`` of one view, whole groups or a part of one.

    ``fit`` is the volume's for the forward convolution, ``weight_fit`` for the weight gradient.
    """

    view: int
    first: int
    end: int
    first_group: int
    groups: int
    extent: Triple
    dilation: Triple
    fit: Fit
    mirrored: tuple[Mirrored, ...]
    weight_fit: Fit
    slices: Slices

    @cached_property
    def channels(self) -> int:
        return self.end - self.first

    def of_input(self, tensor: Tensor, groups: int) -> Tensor:
        """The piece's channels of a tensor with the input's channels."""
        if self.groups == groups:
            return tensor
        per_group = tensor.shape[1] // groups
        return tensor.narrow(1, self.first_group * per_group, self.groups * per_group)

    def of_output(self, tensor: Tensor, dim: int) -> Tensor:
        """The piece's channels of a tensor with the output's channels along ``dim``."""
        return tensor if tensor.shape[dim] == self.channels else tensor.narrow(dim, self.first, self.channels)


def cut(tensor: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
    """A tensor whose first axis has the output's channels, cut into the pieces'."""
    return (tensor,) if len(pieces) == 1 else tensor.split_with_sizes([piece.channels for piece in pieces])


@lru_cache(maxsize=4096)
def pieces_of(geometry: Geometry, out_channels: int, narrow: bool) -> tuple[Piece, ...]:
    """The pieces in the order of their output channels.

    ``narrow``: those of large depthwise layers have a vector's channels, since what a piece takes is held beside the
    result. (On a GPU one launch for all is better.)
    """
    g = geometry
    views = ((g.views[0][0], 0, out_channels),) if g.coincident else g.views
    per_group = out_channels // g.groups
    narrow = narrow and per_group == 1 < g.groups and prod(g.output_size) >= _CUT_POSITIONS
    most = _CUT_CHANNELS if narrow else out_channels
    pieces = []
    for view, first, end in views:
        start, extent, dilation = g.start[view], g.extent(view), g.dilation[view]
        where = start, g.input_size, g.output_size, g.stride, extent, dilation
        # oneDNN's weight gradient (PyTorch 2.14) is wrong, or writes where it must not, for float32 and
        # bfloat16 inputs that are no larger than the kernel along an axis that it pads itself.
        fits = _fit(*where), _mirrored(*where), _fit(*where, pads_small_inputs=False), _slices(view, where)
        while first < end:
            group, done = divmod(first, per_group)
            whole = min((end - first) // per_group, most) if done == 0 else 0
            stop = first + whole * per_group if whole else min(end, (group + 1) * per_group)
            pieces.append(Piece(view, first, stop, group, max(whole, 1), extent, dilation, *fits))
            first = stop
    return tuple(pieces)


def _slices(axis: int, where) -> Slices:
    start, size, out, stride, *_ = (values[axis] for values in where)
    first, end = reach(start, size, out, stride)
    plane = [tuple(values[a] for a in PLANE_AXES[axis]) for values in where]
    return Slices(
        axis=axis,
        first=first,
        count=end - first,
        position=start + first * stride,
        step=stride,
        stride=plane[3],
        dilation=plane[5],
        fit=_fit(*plane),
        weight_fit=_fit(*plane, pads_small_inputs=False),
        mirrored=_mirrored(*plane),
        strips=tuple(_strips(*plane)),
    )


def _strips(start, size, out, stride, extent, dilation):
    """At stride 1 one strip lies in the middle, where a convolution's own symmetric padding reads the right positions.

    oneDNN's fast kernels are for strips at least as wide as the stride, and not for every padding at a stride.
    """
    width, apart = extent[1], max(stride) > 1
    if dilation != (1, 1) or max(stride) > 2 or width <= _STRIP:
        ends = {width}
    elif apart:
        count = -(-width // _STRIP)
        ends = {width * n // count for n in range(1, count + 1)}
    else:
        ends = {*range((width // 2 - _STRIP // 2) % _STRIP, width, _STRIP), width}
    for begin, end in itertools.pairwise(sorted({0} | ends)):
        of = (start[0], start[1] + begin), size, out, stride, (extent[0], end - begin), dilation
        yield slice(begin, end), _fit(*of, pads_small_inputs=False, pads=not apart or len(ends) == 1)
