"""What a fused convolution gives to the stages that it has computed already."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..lifting.rows import rows_of
from ..lifting.rules import function_name

_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_OPERATORS = [
    name for name, value in vars(operator).items() if name[:2] == "__" and callable(value) and hasattr(Tensor, name)
]
_OPERATORS += [f"__r{name[2:]}" for name in _OPERATORS if hasattr(Tensor, f"__r{name[2:]}")]
_OPERATORS += ["__bool__", "__float__", "__int__", "__iter__", "__len__"]


class FusionError(RuntimeError, AttributeError):
    """A fused network took a path through itself that :func:`acs_triton.fuse` had not seen.

    Attributes:
        output: the convolution's output that was read before its time.
    """

    def __init__(self, message: str, output: FusedOutput | None = None):
        super().__init__(message)
        self.output = output


class Stage(NamedTuple):
    """What is done to a convolution's output: the ``"norm"`` of a module's path, or an ``"activation"``."""

    kind: str
    name: str


class FusedOutput:
    """A convolution's output with the stages that follow applied to it.

    The modules and functions of these stages hand it on as it is, the last one as the tensor. It is no
    tensor itself, so that whatever else reads it fails. Its shape, dtype and device are those at every stage.
    """

    def __init__(self, tensor: Tensor, layer: str, stages: tuple[Stage, ...], done: int = 0, inside: bool = False):
        self._tensor = tensor
        self._layer = layer
        self._stages = stages
        self._done = done
        self._inside = inside

    @property
    def shape(self) -> torch.Size:
        return self._tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    @property
    def ndim(self) -> int:
        return self._tensor.dim()

    def dim(self) -> int:
        return self._tensor.dim()

    def size(self, *dim):
        return self._tensor.size(*dim)

    def inside(self, norm: str) -> FusedOutput:
        """The output as the module ``norm`` is to see it."""
        if self._stages[self._done] != Stage("norm", norm):
            raise self._error(norm)
        return FusedOutput(self._tensor, self._layer, self._stages, self._done, inside=True)

    def _after(self) -> FusedOutput | Tensor:
        """The output of the stage that would be computed now."""
        done = self._done + 1
        if done < len(self._stages):
            return FusedOutput(self._tensor, self._layer, self._stages, done)
        rows = rows_of(self._tensor)
        if rows is not None and not rows.run.active:
            raise FusionError(
                f"{self._layer} is fused with what follows it: run the network, or a block, as a whole", self
            )
        return self._tensor

    def _error(self, reader: str) -> FusionError:
        left = " and ".join(stage.name for stage in self._stages[self._done :])
        return FusionError(
            f"{reader} reads the output of {self._layer} before {left}, applied to it already; fuse the network with "
            f"an example that takes this path",
            self,
        )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function_name(function)
        if not (args and isinstance(args[0], cls)):
            raise next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._error(name)
        output = args[0]
        if name in _DROPOUTS and not (args[2] if len(args) > 2 else kwargs["training"]):
            return output
        if name == "gelu" and kwargs.get("approximate", "none") == "tanh":
            name = "gelu_tanh"
        kind, wanted = output._stages[output._done]
        if (output._inside and name == "batch_norm") if kind == "norm" else name == wanted:
            return output._after()
        raise output._error(name)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        raise self._error(f"attribute {name!r}")

    __hash__ = object.__hash__


def _refusal(operator: str):
    def refuse(self, *_):
        raise self._error(operator)

    return refuse


for _name in _OPERATORS:
    setattr(FusedOutput, _name, _refusal(_name))
