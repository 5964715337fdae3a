"""What is known about a tensor inside a lifted network.

A batch of volumes ``(N, C, D, H, W)`` in channels-last memory is, byte for byte, a batch of
slices ``(N * D, C, H, W)``: its *rows* are the slices, volume by volume. Every tensor computed
from it carries a :class:`Rows` record that says where these rows are now.

The record is an attribute of the plain tensor, not a tensor subclass: fake tensors (and with
them ``torch.export``) cannot be wrapped in a subclass, and Dynamo traces attributes.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

ATTRIBUTE = "_acs_rows"


class Rows:
    """Where the slices are in a tensor. Never changed: :meth:`replace` makes another one.

    Attributes:
        run: the :class:`~acs_triton.lifting.run.Run` that the tensor belongs to.
        axes: one letter for each axis: ``r`` the rows, ``p`` positions in the plane, ``c``
            channels or features, ``m`` channels and positions merged, ``o`` an axis of size 1.
        depth: rows that each volume has.
        inner: how many rows each slice has on the ``r`` axis; above 1 where the network merged
            other axes into its batch (attention windows, heads).
        pooled: the rows of a volume are equal, because they were computed from the whole volume.
    """

    __slots__ = ("axes", "depth", "inner", "pooled", "run")

    def __init__(self, run, axes: str, depth: int, inner: int = 1, pooled: bool = False):
        self.run = run
        self.axes = axes
        self.depth = depth
        self.inner = inner
        self.pooled = pooled

    @property
    def axis(self) -> int:
        """The axis that holds the rows."""
        return self.axes.index("r")

    @property
    def slices(self) -> int:
        """Slices of all volumes."""
        return self.run.volumes * self.depth

    def replace(self, axes=None, depth=None, inner=None, pooled=None) -> Rows:
        return Rows(
            self.run,
            self.axes if axes is None else axes,
            self.depth if depth is None else depth,
            self.inner if inner is None else inner,
            self.pooled if pooled is None else pooled,
        )

    def put_on(self, tensor: Tensor) -> Tensor:
        """Attach this record to ``tensor`` and return it."""
        tensor._acs_rows = self
        return tensor


class BatchSize(int):
    """The size of a batch of slices, as the network reads it off a shape.

    Remembers how many slices there were, so that a reshape that uses it after a change of depth
    gets the present size: ``batch = x.shape[0]`` at the start, ``x.view(batch, -1)`` at the end.
    """

    def __new__(cls, value: int, slices: int):
        size = super().__new__(cls, value)
        size.slices = slices
        return size

    def __mul__(self, other):
        product = int(self) * other
        return BatchSize(product, self.slices) if type(product) is int else product

    __rmul__ = __mul__

    def __floordiv__(self, other):
        quotient = int(self) // other
        return BatchSize(quotient, self.slices) if type(quotient) is int else quotient

    def now(self, rows: Rows) -> int:
        """The size that corresponds to it where ``rows`` are."""
        return int(self) * rows.slices // self.slices


def rows_of(value) -> Rows | None:
    """The record of a tensor, None for anything else."""
    return getattr(value, ATTRIBUTE, None) if isinstance(value, Tensor) else None


def tensors_in(values) -> list[Tensor]:
    """The tensors among the arguments of a call, also inside lists, tuples and dictionaries."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_in(value))
        elif isinstance(value, dict):
            found.extend(tensors_in(value.values()))
    return found


def rows_among(args, kwargs) -> Rows | None:
    """The record of the first tensor among the arguments of a call that has one."""
    for values in (args, kwargs.values()) if kwargs else (args,):
        for value in values:
            if isinstance(value, Tensor):
                rows = getattr(value, ATTRIBUTE, None)
            elif isinstance(value, (list, tuple)):
                rows = rows_among(value, {})
            else:
                rows = rows_among((), value) if isinstance(value, dict) else None
            if rows is not None:
                return rows
    return None


def describe_tensor(tensor: Tensor) -> str:
    """Shape for an error message, as a volume where the tensor is a batch of slices."""
    rows = rows_of(tensor)
    if rows is None:
        return f"{tuple(tensor.shape)}"
    if rows.inner == 1 and rows.axis == 0:
        sizes = [rows.run.volumes, *tensor.shape[1:]]
        sizes.insert(2 if tensor.dim() == 4 else 1, rows.depth)
        names = "(N, C, D, H, W)" if tensor.dim() == 4 else "(N, D, ...)"
        return f"{tuple(sizes)} {names}"
    return f"{tuple(tensor.shape)} with {rows.depth} slices a volume on axis {rows.axis}"


def first_of_each_volume(tensor: Tensor, axis: int, volumes: int) -> Tensor:
    """One row a volume: ``(N, ...)`` from ``(N * anything, ...)`` on ``axis``."""
    return tensor.unflatten(axis, (volumes, -1)).select(axis + 1, 0)


def repeat_rows(tensor: Tensor, axis: int, times: int) -> Tensor:
    """Each row of ``axis`` ``times`` times in a row, in memory of its own."""
    return tensor if times == 1 else tensor.repeat_interleave(times, axis)


def regroup(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]] | None:
    """Which axes of ``new`` hold which axes of ``old`` after a reshape.

    Returns pairs of axis lists with equal products, in order, as small as they can be; None
    where the products differ.

    >>> regroup([8, 6, 4], [8, 2, 3, 4])
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine, theirs = [], []
        left = right = 1
        if i < len(old):
            mine.append(i)
            left = old[i]
            i += 1
        if j < len(new):
            theirs.append(j)
            right = new[j]
            j += 1
        while left != right:
            if left < right:
                if i == len(old):
                    return None
                left *= old[i]
                mine.append(i)
                i += 1
            else:
                if j == len(new):
                    return None
                right *= new[j]
                theirs.append(j)
                j += 1
        groups.append((mine, theirs))
    return groups


def infer_size(shape, numel: int) -> list[int]:
    """``shape`` with its -1 filled in (as ``Tensor.view`` does)."""
    shape = list(shape)
    for position, size in enumerate(shape):
        if isinstance(size, int) and size == -1:
            rest = prod(shape[:position]) * prod(shape[position + 1 :])
            shape[position] = numel // rest if rest else 0
            break
    return shape


def splits_or_merges(old: list[int], new: list[int]) -> bool:
    """Whether a reshape from ``old`` to ``new`` only splits axes and merges axes, and never cuts across two."""
    groups = regroup(old, new)
    return groups is not None and all(len(mine) <= 1 or len(theirs) <= 1 for mine, theirs in groups)


def known_equal(one, other) -> bool:
    """Whether two sizes are equal; of symbolic ones, whether they are for every input, without a new guard."""
    if isinstance(one, torch.SymInt) or isinstance(other, torch.SymInt):
        # Where there are symbols this module is loaded; importing it takes longer than the whole library.
        return torch.fx.experimental.symbolic_shapes.statically_known_true(one == other)
    return one == other
