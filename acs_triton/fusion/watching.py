"""One run of a network, watched for what reads the outputs of its convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .output import Stage

_NORMS = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training")
_ACTIVATIONS = ("relu", "silu", "gelu")


class _Value(NamedTuple):
    """A tensor computed from a layer's output by ``stages`` alone."""

    tensor: Tensor
    layer: str
    stages: tuple[Stage, ...]


class Watch(TorchDispatchMode):
    """Follows the outputs of layers through batch norms and activations, up to what else reads them.

    A tensor is told by its memory, which its views share: an operation on a view reads it as well. A
    stage is followed only where it is given the very tensor.

    Args:
        layers: the layers that may be fused, by their paths.
        norms: the batch norms that may be folded, by their paths.
    """

    def __init__(self, layers: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]):
        super().__init__()
        self._owners: dict[int, set[str]] = {}
        for path, module in layers.items():
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), set()).add(path)
        self._state = {
            id(one): path for path, norm in norms.items() for one in norm.state_dict(keep_vars=True).values()
        }
        self._running: str | None = None
        self._norms = {id(norm.running_mean): (path, norm) for path, norm in norms.items()}
        self._values: dict[int, _Value] = {}
        self._kept: list[Tensor] = []
        self._common: dict[str, tuple[Stage, ...]] = {}
        self._norm_calls: Counter[str] = Counter()  # and what else reads its state
        self._folded_calls: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def inside(self, layer: str):
        """The time of a layer's own forward."""
        self._running = layer
        try:
            yield
        finally:
            self._running = None

    def produced(self, tensor: Tensor, layer: str, stages: tuple[Stage, ...] = ()) -> None:
        """A layer gave ``tensor``, or stages made it of what the layer gave."""
        self._values[_memory(tensor)] = _Value(tensor, layer, stages)
        self._kept.append(tensor)  # or another tensor could get its memory

    def read(self, values) -> None:
        """Tensors in a structure are read by something that is no stage."""
        for tensor in filter(torch.is_tensor, tree_leaves(values)):
            value = self._values.get(_memory(tensor))
            if value is not None:
                self.limit(value.layer, value.stages)
            owners = self._owners.get(id(tensor), ())
            if self._running not in owners:
                for layer in owners:  # their weight serves for something else too
                    self.limit(layer, ())
            if id(tensor) in self._state:
                self._norm_calls[self._state[id(tensor)]] += 1

    def limit(self, layer: str, stages: tuple[Stage, ...]) -> None:
        """Let a layer have no other stages than those at the start of ``stages``."""
        known = self._common.get(layer, stages)
        same = [one == other for one, other in zip(known, stages, strict=False)]
        self._common[layer] = known[: same.index(False) if False in same else len(same)]

    def stages(self) -> dict[str, tuple[Stage, ...]]:
        """What can be folded into each layer: the stages that come before everything else that reads its output."""
        found = dict(self._common)
        while True:
            # A norm is folded into all that it is called on, or not at all.
            folded = Counter()
            for layer, stages in found.items():
                for stage in stages:
                    folded[stage.name] += self._folded_calls[layer, stage.name] if stage.kind == "norm" else 0
            shorter = {
                layer: stages[: next(i for i, stage in enumerate(stages) if self._unfolded(stage, folded))]
                for layer, stages in found.items()
                if any(self._unfolded(stage, folded) for stage in stages)
            }
            if not shorter:
                return {layer: stages for layer, stages in found.items() if stages}
            found |= shorter

    def _unfolded(self, stage: Stage, folded: Counter) -> bool:
        return stage.kind == "norm" and folded[stage.name] != self._norm_calls[stage.name]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "prim":  # asks for a property
            return function(*args, **kwargs)
        stage = self._stage(function.overloadpacket.__name__, args, kwargs)
        value = self._values.get(_memory(args[0])) if stage is not None else None
        follows = value is not None and value.tensor is args[0] and _may_follow(value.stages, stage)
        if not follows:
            self.read((args, kwargs))
        result = function(*args, **kwargs)
        if follows:
            if stage.kind == "norm":
                self._norm_calls[stage.name] += 1
                self._folded_calls[value.layer, stage.name] += 1
            self.produced(
                result[0] if isinstance(result, (tuple, list)) else result, value.layer, (*value.stages, stage)
            )
        return result

    def _stage(self, name: str, args, kwargs) -> Stage | None:
        if name.rstrip("_") in _ACTIVATIONS:
            name = name.rstrip("_")
            return Stage("activation", "gelu_tanh" if kwargs.get("approximate", "none") == "tanh" else name)
        path, norm = self._norms.get(id(args[3]), (None, None)) if name in _NORMS else (None, None)
        if norm is None:
            return None
        training = name != "_native_batch_norm_legit_no_training" and args[5]
        own = args[1] is norm.weight and args[2] is norm.bias and args[4] is norm.running_var and args[-1] == norm.eps
        return Stage("norm", path) if own and not training else None


def _may_follow(stages: tuple[Stage, ...], stage: Stage) -> bool:
    """Whether a convolution can compute ``stage`` after ``stages``: one norm at most, then one activation."""
    return not stages or (stages[-1].kind == "norm" and stage.kind == "activation")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
