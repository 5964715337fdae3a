"""One forward pass of a 2D network over volumes."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..frozen import derived
from .errors import LiftingError
from .rows import (
    BatchSize,
    Rows,
    describe_tensor,
    first_of_each_volume,
    known_equal,
    repeat_rows,
    rows_among,
    rows_of,
    tensors_in,
)
from .rules import QUERIES, RULES, function_name


def twin_of(volume) -> Tensor | None:
    """The batch of slices that a volume was made from, to be shown to a hook."""
    return getattr(volume, "_acs_twin", None)


class _Images(threading.local):
    """How many modules are running on images: there, tensors of five axes are no volumes."""

    def __init__(self):
        self.depth = 0


images = _Images()


class Run(TorchFunctionMode):
    """Rewrites, while a 2D network runs on a batch of slices, what mixes positions.

    Attributes:
        volumes: batch size of the volumes.
        axis: axis of the volumes outside, ``(N, C, D, H, W)``, that is the depth here: 2, 3 or 4.
        layers: the modules that are running, outermost first.
        planes: ``(height, width, depth)`` of the volumes seen so far; an upsampling to a plane
            size takes the depth that this size had on the way down.
        batches: sizes that the batch of slices has had; code that remembers one of them after a
            change of depth is given the present one.
        active: how many times the run is entered at the moment.
        record: called as ``record(run, name, args, kwargs, result)`` after each operation.
        refused: called as ``refused(run, error, rows, function, args, kwargs)`` instead of raising
            the error of an operation; what it returns is the operation's result.
    """

    def __init__(self, volumes: int, axis: int = 2, record=None, refused=None):
        super().__init__()
        self.volumes = volumes
        self.axis = axis
        self.layers = []
        self.planes = []
        self.batches = []
        self.active = 0
        self.record = record
        self.refused = refused

    def __enter__(self):
        self.active += 1
        return super().__enter__()

    def __exit__(self, *error):
        self.active -= 1
        return super().__exit__(*error)

    def state(self) -> tuple[list, list, list]:
        """What is known at this point of the pass, for :meth:`resumed`."""
        return self.layers.copy(), self.planes.copy(), self.batches.copy()

    @contextmanager
    def resumed(self, state):
        """The run, as it was at an earlier point, for the time of the block."""
        after = self.layers, self.planes, self.batches
        self.layers, self.planes, self.batches = (part.copy() for part in state)
        try:
            with self:
                yield
        finally:
            self.layers, self.planes, self.batches = after

    @property
    def layer(self):
        """The innermost running module, None outside of all."""
        return self.layers[-1] if self.layers else None

    # ---- volumes <-> slices

    def slices(self, volume: Tensor) -> Tensor:
        """``(N, C, D, H, W)`` -> ``(N * D, C, H, W)``; a view of channels-last memory."""
        depth = volume.shape[2]
        if volume.dtype.is_floating_point:
            volume = volume.contiguous(memory_format=torch.channels_last_3d)
        folded = volume.movedim(2, 1).flatten(0, 1)
        self.batches.append(folded.shape[0])
        return self.noted(Rows(self, "rcpp", depth).put_on(folded))

    def volume(self, folded: Tensor) -> Tensor:
        """``(N * D, C, H, W)`` -> ``(N, C, D, H, W)``, a view; of depth 1 where all slices are equal."""
        rows = rows_of(folded)
        if rows.pooled:
            return first_of_each_volume(folded, 0, self.volumes).unsqueeze(2)
        return folded.unflatten(0, (self.volumes, rows.depth)).movedim(1, 2)

    def like(self, source: Tensor, volume: Tensor) -> Tensor:
        """Slices of a volume computed from ``self.volume(source)``."""
        rows = rows_of(source)
        if rows.pooled and volume.shape[2] == 1:
            return self.pooled(volume.squeeze(2), rows.depth)
        return self.slices(volume)

    def pooled(self, vectors: Tensor, depth: int) -> Tensor:
        """One ``(C, ...)`` a volume -> equal rows, one a slice."""
        axes = "rc" + "o" * (vectors.dim() - 2)
        return Rows(self, axes, depth, pooled=True).put_on(repeat_rows(vectors, 0, depth))

    def fold(self, value, depth: int | None = None):
        """Slices for every volume in a structure of arguments; everything else stays.

        ``depth``, where given, also folds vectors ``(N, F)``, which then stand for whole volumes.
        """

        def one(item):
            if not isinstance(item, Tensor) or rows_of(item) is not None:
                return item
            twin = twin_of(item)
            if twin is not None:
                return twin
            if item.dim() == 5:
                if item.shape[0] != self.volumes:
                    raise LiftingError(
                        f"volumes of one call must have one batch size, got {self.volumes} and {item.shape[0]}"
                    )
                return self.slices(item.movedim(self.axis, 2))
            if depth is not None and item.dim() == 2 and item.shape[0] == self.volumes:
                return self.pooled(item, depth)
            return item

        with torch._C.DisableTorchFunction():
            return tree_map(one, value)

    def unfold(self, value, *, final: bool):
        """Volumes for every batch of slices in a structure of results.

        Feature maps become ``(N, C, D, H, W)``; vectors of whole volumes ``(N, F)``; other
        tensors get the depth after the batch, ``(N, D, ...)``. In a final result vectors that
        differ between slices are averaged over the volume: ``(N, F)``.
        """

        def one(item):
            rows = rows_of(item)
            if rows is None:
                return item
            volume = self._unfold_tensor(item, rows, final)
            if not final:
                volume._acs_twin = item
            return volume

        with torch._C.DisableTorchFunction():
            return tree_map(one, value)

    def _unfold_tensor(self, item: Tensor, rows: Rows, final: bool) -> Tensor:
        axis, dim = rows.axis, item.dim()
        if axis == 0 and rows.inner == 1:
            if dim <= 2 and rows.pooled:
                return first_of_each_volume(item, 0, self.volumes)
            if dim == 4:
                return self.volume(item).movedim(2, self.axis)
        split = item.unflatten(axis, (self.volumes, rows.depth * rows.inner))
        if final and dim <= 2 and rows.inner == 1 and item.dtype.is_floating_point:
            return split.mean(axis + 1)
        return split

    def noted(self, tensor: Tensor) -> Tensor:
        """``tensor``; if it is a batch of images, the depth of its plane is remembered."""
        rows = rows_of(tensor)
        if rows.axes in ("rcpp", "rcmm") and rows.inner == 1 and not rows.pooled:
            self.planes.append((tensor.shape[2], tensor.shape[3], rows.depth))
        return tensor

    # ---- operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function_name(function)
        if name in QUERIES:
            result = function(*args, **kwargs)
            return _with_batch_size(args[0], args[1:], kwargs, result) if name in ("shape", "size") else result
        rule = RULES.get(name)
        rows = rows_among(args, kwargs)
        if rows is None or rows.run is not self:
            if rule is not None and rule.spatial:
                return self._without_rows(name, function, args, kwargs)
            return function(*args, **kwargs)
        try:
            result = self._rewritten(name, rule, function, args, kwargs)
        except LiftingError as error:
            if self.refused is None:
                raise
            return self.refused(self, error, rows, function, args, kwargs)
        if self.record is not None:
            self.record(self, name, args, kwargs, result)
        return result

    def _rewritten(self, name, rule, function, args, kwargs):
        if kwargs.get("out") is not None:
            raise self.error(name, args, kwargs, "it writes to a given tensor (out=)")
        if rule is None:
            raise self.error(name, args, kwargs, "it has no rule for volumes")
        if torch.compiler.is_compiling():
            return rule.apply(self, function, args, kwargs)
        try:
            return rule.apply(self, function, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if isinstance(error, LiftingError) and str(error).startswith(_PREFIX):
                raise
            raise self.error(name, args, kwargs, str(error)) from error

    def _without_rows(self, name, function, args, kwargs):
        """An operation on the plane of a tensor that does not come from a volume."""
        operands = tensors_in(args) + tensors_in(kwargs.values())
        if not operands:
            return function(*args, **kwargs)
        first = operands[0]
        if first.dim() == 4 and 1 < first.shape[0] in self.batches and not _has_equal_rows(first):
            raise self.error(
                name, args, kwargs, "its input differs between slices, but no torch function computed it from them"
            )
        if name in ("conv2d", "conv_transpose2d") and len(operands) > 1 and operands[1].dim() == 5:
            # An inflated kernel on an image: what it does to a volume of equal slices.
            def flat(item):
                return item.sum(self.axis) if item is operands[1] else item

            args, kwargs = tuple(flat(item) for item in args), {key: flat(item) for key, item in kwargs.items()}
        return function(*args, **kwargs)

    def error(self, name: str, args, kwargs, reason: str) -> LiftingError:
        """The error of operation ``name``, with module path and shapes."""
        shapes = ", ".join(describe_tensor(tensor) for tensor in tensors_in(args) + tensors_in(kwargs.values()))
        return LiftingError(f"{_PREFIX} {name} in {self.path}: {reason}; its tensors are {shapes}")

    @property
    def lift(self):
        """How the running layer is lifted."""
        return self.layer._acs_lift

    def view_weight(self, weight: Tensor, channels: int | None = None) -> Tensor:
        """Shares ``(O, 3)`` of the views in each output channel of the running layer."""
        core = self.layer._parameters.get("soft_w_core") if self.lift.kind == "soft" else None
        if core is not None:
            return derived(core, "softmax", lambda core: core.softmax(-1))
        shape = weight.shape[0] if channels is None else channels, 3
        return derived(weight, shape, lambda weight: weight.new_full(shape, 1 / 3))

    @property
    def path(self) -> str:
        """Module path and class of the running layer, for messages."""
        if self.layer is None:
            return "the network"
        path = self.layer._acs_lift.path
        return f"{path or 'the network itself'} ({type(self.layer).__name__})"

    # ---- what the rules need to know

    def depth_of_plane(self, height: int, width: int, default: int) -> int:
        """Depth that volumes of this plane size have had; the one nearest to ``default``."""
        depths = [depth for h, w, depth in self.planes if known_equal(h, height) and known_equal(w, width)]
        if not depths or any(known_equal(depth, default) for depth in depths):
            return default
        return depths[0] if len(depths) == 1 else sorted(depths, key=lambda depth: abs(depth - default))[0]

    def is_stale_batch(self, size: int) -> bool:
        """Whether ``size`` is a batch size of slices from before a change of depth."""
        return size in self.batches


def _with_batch_size(tensor: Tensor, dim, kwargs, result):
    """A shape, or one size of it, whose batch remembers the number of slices."""
    rows = rows_of(tensor)
    if rows is None or torch.compiler.is_compiling():
        return result
    axis = rows.axis
    if not isinstance(result, tuple):
        dim = dim[0] if dim else kwargs["dim"]
        return BatchSize(result, rows.slices) if type(result) is int and dim % tensor.dim() == axis else result
    if type(result[axis]) is not int:
        return result
    return torch.Size((*result[:axis], BatchSize(result[axis], rows.slices), *result[axis + 1 :]))


def _has_equal_rows(tensor: Tensor) -> bool:
    """Whether a tensor that the network made without looking at the slices is the same for all."""
    if tensor.stride(0) == 0:
        return True
    if torch.compiler.is_compiling():
        return False
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return True
    return torch.equal(tensor, tensor[:1].expand_as(tensor))


_PREFIX = "cannot lift"
