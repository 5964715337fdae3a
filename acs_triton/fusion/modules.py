"""``fuse``: find what can be folded into the convolutions of a network, and do it in a copy."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..activations import activate
from ..frozen import FrozenParameter, supported
from ..lifting.modules import has_hooks, is_lifted, lifted_class
from ..lifting.rows import rows_of
from ..lifting.rules import QUERIES, function_name
from ..operators import ACSConv, Conv2_5d, SoftACSConv
from .output import FusedOutput, FusionError, Stage
from .watching import Watch

_NATIVE = (ACSConv, SoftACSConv, Conv2_5d)
_Norm = nn.modules.batchnorm._BatchNorm


class _FusedMeta(type):
    """Of the classes that are made here: pickles say how to make them."""


class _Fused:
    """Mixed into the class of a convolution that computes the stages that follow it."""

    def forward(self, *args, **kwargs):
        if self.training:
            raise _in_training(self._acs_path)
        output = super().forward(*args, **kwargs)
        if is_lifted(self) and rows_of(output) is None:  # of an image; volumes are lifting's
            output = activate(output, self._acs_activation)
        return FusedOutput(output, self._acs_path, self._acs_stages)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *(f"{stage.kind}={stage.name}" for stage in self._acs_stages)])


class _Folded:
    """Mixed into the class of a batch norm that convolutions compute. It has no state left."""

    def forward(self, input):
        if not isinstance(input, FusedOutput):
            raise FusionError(f"{self._acs_path} is folded into a convolution, but its input comes from elsewhere")
        if self.training:
            raise _in_training(self._acs_path)
        return super().forward(input.inside(self._acs_path))

    def extra_repr(self) -> str:
        return f"{self.num_features}"


def _in_training(path: str) -> RuntimeError:
    return RuntimeError(f"{path} is fused for inference: call eval(), and train the network that it was made from")


@functools.cache
def _mixed_class(mixin: type, base: type) -> type:
    name = mixin.__name__.lstrip("_") + base.__name__
    return _FusedMeta(name, (mixin, base), {"__doc__": base.__doc__, "_acs_made_of": (mixin, base)})


copyreg.pickle(_FusedMeta, lambda made: (_mixed_class, made._acs_made_of))


def _mix_in(mixin: type, module: nn.Module, path: str) -> None:
    lifted = is_lifted(module)
    made = _mixed_class(mixin, type(module)._acs_base if lifted else type(module))
    module.__class__ = lifted_class(made) if lifted else made
    module._acs_path = path


def fuse(model: nn.Module, example=None) -> nn.Module:
    """A copy of a network for inference: batch norms folded into ACS layers, activations into their kernels.

    A layer here is an ACS, Soft ACS or 2.5D layer, or a convolution of a lifted network. A batch norm
    that alone reads its output is multiplied into its weights, as ``torch.nn.utils.fuse_conv_bn_eval``
    does; a ReLU, SiLU or GELU that alone reads the result is applied by the convolution's kernel before
    it stores. All else stays as it is, the modules' names too; folded batch norms have no state left.

    The layers are found by watching one run on tensors without data: whatever reads an output is seen,
    however the network is written. A later call that takes a path through the network which that run
    did not take raises :class:`FusionError`; no call computes something else. (One thing is not seen: a path
    that uses the weight of a layer by itself, without the layer.)

    Args:
        model: a network of this library's layers, lifted, or both, in eval mode. It stays as it is.
        example: its input, a tensor or a tuple of arguments, of which only shape, dtype and device
            count; by default a volume of 96 voxels a side.

    Returns:
        The fused copy, for eval mode only. Its parameters require no gradients, its input may. Its layers keep
        what they compute from their weights (packed for a kernel, cast by autocast) until the weights change.

    Raises:
        TypeError, ValueError: ``model`` is no module, is in training mode, has no layer of this
            library, or does not run on ``example``.

    >>> block = torch.nn.Sequential(ACSConv(1, 6, 3), torch.nn.BatchNorm3d(6), torch.nn.ReLU()).eval()
    >>> fused = fuse(block)
    >>> print(fused[0].extra_repr())
    1, 6, kernel_size=(3, 3, 3), stride=(1, 1, 1), acs_kernel_split=(2, 2, 2), norm=1, activation=relu
    >>> volume = torch.rand(1, 1, 4, 5, 6)
    >>> torch.allclose(fused(volume), block(volume), atol=1e-6)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model is in training mode, its batch norms follow the batch; call model.eval() first")
    if not any(map(_is_layer, model.modules())):
        raise ValueError("model has neither ACS layers nor lifted convolutions to fuse; convert it first")
    watch = _watched(copy.deepcopy(model), example)
    while True:
        fused = copy.deepcopy(model)
        _fold(fused, watch.stages())
        misread = _misread(fused, example)
        if misread is None:
            return fused
        # A function in place whose argument is read again, which looks in the watched run like its result.
        watch.limit(misread._layer, misread._stages[: misread._done])


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _NATIVE) or (is_lifted(module) and isinstance(module, nn.Conv2d))


def _has_weight(module: nn.Module) -> bool:
    """Whether a module is a layer with a weight of its own, not a computed one."""
    return _is_layer(module) and module._parameters.get("weight") is not None


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing stands between a module's class and the network: hooks, parametrizations, patched methods."""
    return not (
        has_hooks(module)
        or parametrize.is_parametrized(module)
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
        or module.training
        or type(type(module)) is not type
    )


def _inputs(model: nn.Module, example, fake: FakeTensorMode) -> tuple:
    if example is None:
        first = next(filter(_is_layer, model.modules()))
        return (torch.empty(1, first.in_channels, 96, 96, 96, dtype=first.weight.dtype, device=first.weight.device),)
    return tree_map_only(Tensor, fake.from_tensor, example if isinstance(example, tuple) else (example,))


def _watched(model: nn.Module, example) -> Watch:
    """The watch over a run of ``model``, which is not to be used again."""
    modules = {path: module for path, module in model.named_modules() if _is_plain(module)}
    layers = {path: module for path, module in modules.items() if _has_weight(module)}
    tracked = {path: one for path, one in modules.items() if isinstance(one, _Norm) and one.running_mean is not None}
    watch, sizes = Watch(layers, tracked), {}
    for path, module in layers.items():
        module.forward = _reporting(module, path, watch, sizes)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        inputs = _inputs(model, example, fake)
        try:
            with watch:
                watch.read(model(*inputs))
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor))
            raise ValueError(f"model does not run on example={shapes} without data: {error}") from error
        for path, size in sizes.items():
            if not _is_linear(layers[path], size):
                watch.limit(path, ())
    return watch


def _reporting(module: nn.Module, path: str, watch: Watch, sizes: dict):
    """A layer's forward that tells ``watch`` of its output, and notes the input's size."""
    forward = module.forward

    def reporting(*args, **kwargs):
        with watch.inside(path):
            output = forward(*args, **kwargs)
        sizes[path] = next(one.shape for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
        watch.produced(output, path)
        return output

    return reporting


class _Calls(TorchFunctionMode):
    """Lists the functions that are called, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function_name(function)
        if name not in QUERIES:
            self.calls.append((name, (*args, *(kwargs or {}).values()), result))
        return result


def _is_linear(module: nn.Module, size) -> bool:
    """Whether a layer's output is the convolution of something with the layer's own weight and bias, and no more."""
    if not is_lifted(module):
        return type(module) in _NATIVE
    base = type(module)._acs_base
    if base.forward is nn.Conv2d.forward and base._conv_forward is nn.Conv2d._conv_forward:
        return True
    if module.weight.dim() != 4:
        return False
    image = module.weight.new_empty(size)
    with _Calls() as mode:
        output = base.forward(module, image)
    name, args, result = mode.calls.pop()
    own = len(args) > 2 and args[1] is module.weight and args[2] is module.bias
    read = {id(tensor) for _, before, _ in mode.calls for tensor in tree_leaves(before)}
    return name == "conv2d" and own and result is output and not {id(module.weight), id(module.bias)} & read


def _fold(model: nn.Module, stages: Mapping[str, tuple[Stage, ...]]) -> None:
    """Let each layer compute its stages, and its norm compute nothing."""
    norms, frozen = {}, {}
    for path, following in stages.items():
        layer = model.get_submodule(path)
        for stage in following:
            if stage.kind == "norm":
                norms[stage.name] = model.get_submodule(stage.name)
                _multiply_in(layer, norms[stage.name])
        _mix_in(_Fused, layer, path)
        layer._acs_stages = following
        layer._acs_activation = next((stage.name for stage in following if stage.kind == "activation"), None)
    for path, norm in norms.items():
        for state in (norm._parameters, norm._buffers):
            state.update(dict.fromkeys(state))
        norm.track_running_stats = False  # or checkpoints without versions would be given its counter
        _mix_in(_Folded, norm, path)
    for layer in filter(_has_weight, model.modules() if supported() else ()):
        for name in ("weight", "soft_w_core"):
            parameter = layer._parameters.get(name)
            if parameter is not None:
                frozen[parameter] = FrozenParameter(parameter.detach())
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = frozen.get(parameter, parameter)
    model.requires_grad_(False)


def _multiply_in(layer: nn.Module, norm: nn.Module) -> None:
    """New weights of ``layer``, for which its output is that of ``norm``."""
    weight, bias = layer.weight, layer.bias
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias
        new_weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    layer.weight, layer.bias = nn.Parameter(new_weight.to(weight.dtype)), nn.Parameter(shift.to(weight.dtype))


def _misread(model: nn.Module, example) -> FusedOutput | None:
    """An output that a fused network reads before its time."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        try:
            results = model(*_inputs(model, example, fake))
        except Exception as error:
            cause = error
            while cause is not None:
                if isinstance(cause, FusionError) and cause.output is not None:
                    return cause.output
                cause = cause.__cause__ or cause.__context__
            raise
    return next((leaf for leaf in tree_leaves(results) if isinstance(leaf, FusedOutput)), None)
