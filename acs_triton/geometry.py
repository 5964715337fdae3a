"""Where an ACS convolution samples its input: sizes, splits, offsets. Plain integers, no tensors.

Terms, used the same way everywhere in the library:

* The spatial axes are numbered ``D, H, W = 0, 1, 2``.
* A *view* is one orientation of the 2D kernel: 0 axial ``(1, ku, kv)``, 1 coronal
  ``(ku, 1, kv)``, 2 sagittal ``(ku, kv, 1)`` (Yang et al., arXiv:1911.10477, section 3.1).
  The axis on which a view's kernel has extent 1 is its *through-plane* axis; it has the
  view's own number. The other two are its *plane axes* ``(u, v)``.
* Output index ``i`` of view ``v`` reads, along axis ``a`` and for tap ``t``, position
  ``i * stride[a] + start[v][a] + t * dilation[v][a]``. Positions outside the input are zero.

Padding and dilation are kept for four *roles*: ``D`` (always a ``u`` axis), ``H`` as a ``u``
axis (axial), ``H`` as a ``v`` axis (sagittal) and ``W`` (always a ``v`` axis). A triple
``(D, H, W)`` and a plane pair ``(u, v)`` are both special cases of that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

VIEWS = ("axial", "coronal", "sagittal")
MERGED = len(VIEWS)
"""In place of a view's number: all views with channels at once, each position that they read taken once."""

AXES = ("D", "H", "W")
PLANE_AXES = ((1, 2), (0, 2), (0, 1))
"""Plane axes ``(u, v)`` of each view."""

ROLES = 4
_D, _H_AS_U, _H_AS_V, _W = range(ROLES)
_PLANE_ROLES = ((_H_AS_U, _W), (_D, _W), (_D, _H_AS_V))
_THROUGH_ROLE = (_D, _H_AS_U, _W)

RULES = ("acsconv", "aligned", "planar")
"""How the through-plane sample is placed.

* ``acsconv``: the published package's rule, with its quirks, so that checkpoints trained
  with it give the same numbers.
* ``aligned``: the centre tap of the equivalent ``(k, k, k)`` kernel.
* ``planar``: the through-plane axis has a kernel of size 1 of its own (2.5D convolution);
  exactly one view has channels.
"""

Triple = tuple[int, int, int]


def default_split(out_channels: int) -> Triple:
    """Output channels of the three views: a third each, the remainder to axial, then coronal.

    >>> default_split(64)
    (22, 21, 21)
    """
    third, rest = divmod(out_channels, 3)
    return (third + (rest > 0), third + (rest > 1), third)


def per_axis(values: tuple[int, ...]) -> tuple[int, ...]:
    """Values of the four roles for a plane pair ``(u, v)`` or a triple ``(D, H, W)``."""
    if len(values) == 2:
        u, v = values
        return (u, u, v, v)
    d, h, w = values
    return (d, h, h, w)


def conv_size(size, kernel: int, stride: int, low: int, high: int, dilation: int):
    """Output size of a convolution along one axis (the formula of ``torch.nn.Conv3d``)."""
    return (size + low + high - dilation * (kernel - 1) - 1) // stride + 1


def reach(position: int, size: int, out: int, stride: int) -> tuple[int, int]:
    """First and end output index along one axis that read inside the input, where index 0 reads ``position``."""
    first = max(0, -(position // stride))
    return first, max(first, min(out, (size - 1 - position) // stride + 1))


def through_offset(rule: str, size: int, out: int, kernel: int, stride: int, low: int, dilation: int) -> int:
    """Through-plane position that output index 0 reads.

    The ``acsconv`` rule is that of ACSConv 0.1.1 (``acs_conv_f``): no crop where the output
    has the input's size or half of it, otherwise a crop that starts at ``kernel // 2`` of the
    padded input whatever the dilation. Where its uncropped size would not be the
    convolution's, that package fails; the crop is taken there.
    """
    if rule == "planar":
        return -low
    if rule == "aligned":
        return dilation * (kernel // 2) - low
    uncropped = out in (size, size / 2) and (size - 1) // stride + 1 == out
    return 0 if uncropped else kernel // 2 - low


@dataclass(frozen=True)
class MergedTaps:
    """The taps of several views, each position once.

    Attributes:
        positions: input position of each, relative to ``output index * stride``: those of the first view, then
            what the next view adds, ...
        number: ``number[view][tap]`` is the place of a view's tap among them; empty for views without channels.
    """

    positions: tuple[Triple, ...]
    number: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Geometry:
    """A convolution resolved for one input size. See the module's docstring for the terms.

    Attributes:
        input_size, output_size, stride: per axis ``(D, H, W)``, in voxels.
        kernel_size: ``(ku, kv)``.
        split: output channels of the three views, contiguous in that order; empty if the views are *mixed*:
            every output channel has a kernel in each of them, and is their sum (Soft ACS).
        groups: channel groups; output channel ``o`` of ``O`` reads group ``o // (O / groups)``.
        start: ``start[view][axis]``, the position that tap 0 of output index 0 reads.
        dilation: ``dilation[view][axis]``; 1 on the through-plane axis.
    """

    input_size: Triple
    output_size: Triple
    stride: Triple
    kernel_size: tuple[int, int]
    split: Triple | tuple[()]
    groups: int
    start: tuple[Triple, Triple, Triple]
    dilation: tuple[Triple, Triple, Triple]

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def __hash__(self) -> int:  # once: it is the key of every plan
        return self._hash

    def extent(self, view: int) -> Triple:
        """Number of taps of a view per axis, e.g. ``(1, ku, kv)`` for the axial one."""
        taps = [1, 1, 1]
        for axis, size in zip(PLANE_AXES[view], self.kernel_size, strict=True):
            taps[axis] = size
        return tuple(taps)

    @property
    def mixed(self) -> bool:
        """Whether every output channel is the sum of a convolution in each view."""
        return not self.split

    @cached_property
    def views(self) -> tuple[tuple[int, int, int], ...]:
        """``(view, first channel, end channel)`` of every view that has output channels; not for mixed views."""
        ranges, first = [], 0
        for view, count in enumerate(self.split):
            if count:
                ranges.append((view, first, first + count))
            first += count
        return tuple(ranges)

    @cached_property
    def coincident(self) -> bool:
        """Whether all views with channels read the same positions, so that one conv3d does all."""
        used = [(self.extent(view), self.start[view], self.dilation[view]) for view, _, _ in self.views]
        return all(one == used[0] for one in used)

    def taps(self, view: int) -> tuple[Triple, ...]:
        """Input position of each tap of a view (or :data:`MERGED`), relative to ``output index * stride``."""
        if view == MERGED:
            return self.merged.positions
        result = []
        for tap in itertools.product(*map(range, self.kernel_size)):
            position = list(self.start[view])
            for axis, t in zip(PLANE_AXES[view], tap, strict=True):
                position[axis] += t * self.dilation[view][axis]
            result.append(tuple(position))
        return tuple(result)

    def tap_count(self, view: int) -> int:
        """Number of :meth:`taps`."""
        return len(self.merged.positions) if view == MERGED else self.kernel_size[0] * self.kernel_size[1]

    @cached_property
    def merged(self) -> MergedTaps:
        """The taps of all views with channels: 19 instead of 27 for three 3x3 views on one grid, 61 for 5x5."""
        used = range(3) if self.mixed else [view for view, _, _ in self.views]
        taps = tuple(self.taps(view) if view in used else () for view in range(3))
        numbers = {}
        for position in itertools.chain(*taps):
            numbers.setdefault(position, len(numbers))
        return MergedTaps(tuple(numbers), tuple(tuple(numbers[p] for p in of_view) for of_view in taps))

    def one_view(self, view: int, out_channels: int) -> Geometry:
        """The same convolution with all channels in one view."""
        return replace(self, split=tuple(out_channels if v == view else 0 for v in range(3)))


@dataclass(frozen=True)
class ConvParams:
    """The arguments of an ACS convolution, for any input size.

    Attributes:
        kernel_size: ``(ku, kv)``.
        stride: per axis.
        padding_low, padding_high, dilation: one value for each of the four roles.
        groups, split: as in :class:`Geometry`; the weight of mixed views is ``(O, C / groups, 3, ku, kv)``.
        rule: one of :data:`RULES`.
        prepadded: the input already carries the padding (any mode but zeros); sizes and
            offsets are those of the input without it.
    """

    kernel_size: tuple[int, int]
    stride: Triple
    padding_low: tuple[int, ...]
    padding_high: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    split: Triple | tuple[()]
    rule: str = "acsconv"
    prepadded: bool = False

    def args(self) -> tuple:
        """The fields in order, as the registered operators take them."""
        return (
            self.kernel_size,
            self.stride,
            self.padding_low,
            self.padding_high,
            self.dilation,
            self.groups,
            self.split,
            self.rule,
            self.prepadded,
        )

    @classmethod
    def from_args(cls, args) -> ConvParams:
        """The inverse of :meth:`args`; lists, as the dispatcher passes them, become tuples."""
        return _params_of(tuple([tuple(arg) if type(arg) is list else arg for arg in args]))

    @property
    def carried(self) -> tuple[Triple, Triple]:
        """Padding ``(low, high)`` per axis that a prepadded input carries: the larger of an axis's roles."""
        if not self.prepadded:
            return (0, 0, 0), (0, 0, 0)
        return tuple((d, max(u, v), w) for d, u, v, w in (self.padding_low, self.padding_high))

    def _unpadded(self, input_size) -> tuple:
        return tuple(size - low - high for size, low, high in zip(input_size, *self.carried, strict=True))

    def _size(self, size, axis: int, role: int, kernel: int):
        return conv_size(
            size, kernel, self.stride[axis], self.padding_low[role], self.padding_high[role], self.dilation[role]
        )

    def _planar_output_size(self, input_size) -> Triple:
        (view,) = (v for v, count in enumerate(self.split) if count)
        sizes = [0, 0, 0]
        sizes[view] = self._size(input_size[view], view, _THROUGH_ROLE[view], 1)
        for axis, role, kernel in zip(PLANE_AXES[view], _PLANE_ROLES[view], self.kernel_size, strict=True):
            sizes[axis] = self._size(input_size[axis], axis, role, kernel)
        return tuple(sizes)

    def output_size(self, input_size) -> Triple:
        """Output size per axis for an input size per axis (ints or SymInts).

        Raises:
            ValueError: the views disagree, or the kernel does not fit into the padded input.
        """
        ku, kv = self.kernel_size
        input_size = self._unpadded(input_size)
        if self.rule == "planar":
            sizes = self._planar_output_size(input_size)
        else:
            sizes = (
                self._size(input_size[0], 0, _D, ku),
                self._size(input_size[1], 1, _H_AS_U, ku),
                self._size(input_size[2], 2, _W, kv),
            )
            if self._h_roles_differ():
                other = self._size(input_size[1], 1, _H_AS_V, kv)
                if sizes[1] != other:
                    raise ValueError(
                        f"padding and kernel_size={self.kernel_size} give views of different output sizes: H = "
                        f"{sizes[1]} in the axial view, H = {other} in the sagittal view; a plane padding (pad_u, "
                        f"pad_v) must make 2*pad_u - dilation_u*(ku-1) equal to 2*pad_v - dilation_v*(kv-1)"
                    )
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1:
                raise ValueError(
                    f"kernel_size={self.kernel_size} with dilation {self._roles_as_text(self.dilation)} is larger than "
                    f"the padded input along {axis}: input size {tuple(input_size)}, padding "
                    f"{self._roles_as_text(self.padding_low)}; use a larger input or more padding"
                )
        return sizes

    def repeats_one_plane(self, input_size, view: int) -> bool:
        """Whether a view of Soft ACS is one plane, repeated along its through-plane axis, in ACSConv 0.1.1.

        Its uncropped view can come out with one plane where the output has more (a stride of at
        least the input's size); the sum of the views then broadcasts it.
        """
        size, stride = input_size[view], self.stride[view]
        if self.rule != "acsconv" or self.prepadded or stride == 1 or size > stride:
            return False
        out = self.output_size(input_size)[view]
        return out > 1 and out in (size, size / 2)

    def offset_varies(self, view: int) -> bool:
        """Whether a view's through-plane offset is another one for some input sizes (see :func:`through_offset`)."""
        role = _THROUGH_ROLE[view]
        centre = self.kernel_size[role == _W] // 2
        return self.rule == "acsconv" and self.stride[view] > 1 and centre != self.padding_low[role]

    def plain_conv(self, view: int, input_size) -> tuple[tuple[int, int, int], ...]:
        """``(low, high, dilation)`` per axis of a plain convolution that computes a view.

        Low and high are its zero padding, a crop where negative. They do not depend on sizes, nor
        guard on SymInts, but where the offset varies; there a size that is no int counts as
        one for which ACSConv crops.
        """
        low, high, (carried_low, carried_high) = self.padding_low, self.padding_high, self.carried
        axes = [None] * 3
        for axis, role in zip(PLANE_AXES[view], _PLANE_ROLES[view], strict=True):
            axes[axis] = low[role] - carried_low[axis], high[role] - carried_high[axis], self.dilation[role]
        role, stride = _THROUGH_ROLE[view], self.stride[view]
        kernel = 1 if self.rule == "planar" else self.kernel_size[role == _W]
        added = low[role] + high[role] - self.dilation[role] * (kernel - 1)
        size = self._unpadded(input_size)[view]
        if self.rule == "acsconv" and not (self.offset_varies(view) and isinstance(size, int)):
            offset = kernel // 2 - low[role] if added or stride > 1 else 0
        else:
            out = (size + added - 1) // stride + 1
            offset = through_offset(self.rule, size, out, kernel, stride, low[role], self.dilation[role])
        start = carried_low[view] + offset
        axes[view] = -start, added - carried_low[view] - carried_high[view] + start, 1
        return tuple(axes)

    def one_view(self, view: int, out_channels: int) -> ConvParams:
        """The same convolution with all channels in one view."""
        return replace(self, split=tuple(out_channels if v == view else 0 for v in range(3)))

    def mixed(self) -> ConvParams:
        """The same convolution with mixed views."""
        return replace(self, split=())

    def without_through_plane(self, view: int) -> ConvParams:
        """The planar rule for the one view with channels: its through-plane axis unpadded."""
        low, high = list(self.padding_low), list(self.padding_high)
        low[_THROUGH_ROLE[view]] = high[_THROUGH_ROLE[view]] = 0
        return replace(self, padding_low=tuple(low), padding_high=tuple(high), rule="planar")

    def _h_roles_differ(self) -> bool:
        ku, kv = self.kernel_size
        pairs = (self.padding_low, self.padding_high, self.dilation)
        return ku != kv or any(values[_H_AS_U] != values[_H_AS_V] for values in pairs)

    @staticmethod
    def _roles_as_text(values: tuple[int, ...]) -> str:
        d, u, v, w = values
        return f"(D {d}, H {u}, W {w})" if u == v else f"(u {d}, v {w})"

    def geometry(self, input_size) -> Geometry:
        """Resolve for one input size (ints). Cached: equal arguments give the same object."""
        return _resolve(self, tuple(input_size))

    @cached_property
    def _hash(self) -> int:
        return hash(self.args())

    def __hash__(self) -> int:  # once, as of geometries
        return self._hash


@lru_cache(maxsize=4096)
def _params_of(args: tuple) -> ConvParams:
    return ConvParams(*args)


@lru_cache(maxsize=4096)
def _resolve(params: ConvParams, input_size: Triple) -> Geometry:
    output_size = params.output_size(input_size)
    unpadded, (carried, _) = params._unpadded(input_size), params.carried
    starts, dilations = [], []
    for view in range(3):
        start, dilation = list(carried), [1, 1, 1]
        for axis, role in zip(PLANE_AXES[view], _PLANE_ROLES[view], strict=True):
            start[axis] -= params.padding_low[role]
            dilation[axis] = params.dilation[role]
        role = _THROUGH_ROLE[view]
        start[view] += through_offset(
            params.rule,
            unpadded[view],
            output_size[view],
            params.kernel_size[role == _W],
            params.stride[view],
            params.padding_low[role],
            params.dilation[role],
        )
        starts.append(tuple(start))
        dilations.append(tuple(dilation))
    return Geometry(
        input_size=input_size,
        output_size=output_size,
        stride=params.stride,
        kernel_size=params.kernel_size,
        split=params.split,
        groups=params.groups,
        start=tuple(starts),
        dilation=tuple(dilations),
    )
