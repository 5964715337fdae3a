"""``convert``: turn the modules of a 2D network into lifted ones, in place, keeping their state."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..operators import ACSConv, Conv2_5d, SoftACSConv
from .errors import LiftingError
from .options import INFLATIONS, LayerRules, Lift, check_kind
from .recompute import follow_checkpoints
from .rows import rows_among, rows_of, tensors_in
from .run import Run, images, twin_of
from .tracing import ask_about_all_functions
from .weights import adapt_checkpoint, adapt_first_convolution, add_parameters, is_inflated

_SOLID = (
    ACSConv,
    SoftACSConv,
    Conv2_5d,
    *(value for name, value in vars(nn).items() if name.endswith("3d") and "Dropout" not in name),
)
"""Modules that work on volumes by themselves."""

_PLANAR = tuple(value for name, value in vars(nn).items() if name.endswith("2d") and "Dropout" not in name)
"""Modules that do not."""


class _Lifted:
    """Mixed into the class of every module of a lifted network, before its own class."""

    def __call__(self, *args, **kwargs):
        rows = rows_among(args, kwargs) if has_hooks(self) else None
        if rows is None:
            return super().__call__(*args, **kwargs)
        run = rows.run  # hooks see volumes
        args, kwargs = run.unfold(args, final=False), run.unfold(kwargs, final=False)
        return run.fold(super().__call__(*args, **kwargs), rows.depth)

    def forward(self, *args, **kwargs):
        rows = rows_among(args, kwargs)
        if rows is not None:
            return _resume(rows.run, self, super().forward, args, kwargs)
        tensors = tensors_in(args) + tensors_in(kwargs.values())
        volumes = [tensor for tensor in tensors if tensor.dim() == 5 or twin_of(tensor) is not None]
        twin = twin_of(volumes[0]) if volumes else None
        if volumes and (self._acs_lift.folds or twin is not None) and not images.depth:
            run = Run(volumes[0].shape[0], self._acs_lift.across) if twin is None else rows_of(twin).run
            args, kwargs = run.fold(args), run.fold(kwargs)
            result = _resume(run, self, super().forward, args, kwargs)
            return run.unfold(result, final=twin is None)
        if volumes and not self._acs_lift.folds:
            return _call_mixed(self, super().forward, args, kwargs)
        if not tensors or not self._acs_lift.folds:
            return super().forward(*args, **kwargs)
        images.depth += 1
        try:
            if is_inflated(self):
                with Run(1, self._acs_lift.axis):
                    return super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs)
        finally:
            images.depth -= 1

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        adapt_checkpoint(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __reduce_ex__(self, protocol):
        rebuild, args, *rest = super().__reduce_ex__(protocol)
        base = type(self)._acs_base
        args = tuple(base if item is type(self) else item for item in args)
        return (_rebuild, (rebuild, args), *rest)


def _resume(run, module, forward, args, kwargs):
    """Run a module's own forward inside ``run``."""
    run.layers.append(module)
    try:
        if run.active:
            return forward(*args, **kwargs)
        with run:
            return forward(*args, **kwargs)
    finally:
        run.layers.pop()


def _call_mixed(module, forward, args, kwargs):
    """Run a module that contains native 3D modules on volumes as they are; its 2D parts fold them."""
    try:
        return forward(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, (LiftingError, torch.OutOfMemoryError)):
            raise
        names = ", ".join([name for name, child in module.named_modules() if isinstance(child, _SOLID)][:3])
        raise LiftingError(
            f"cannot lift {module._acs_lift.path or 'the network itself'} ({type(module).__name__}): it "
            f"{f'contains 3D modules ({names})' if names else 'is used beside 3D modules and has no 2D ones'}, so it "
            f"is given volumes as they are, but fails on them: {error}"
        ) from error


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own around its calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@functools.cache
def lifted_class(base: type) -> type:
    """``base`` with the mixin of lifted modules."""
    if issubclass(base, torch.jit.ScriptModule):
        raise LiftingError("cannot lift a ScriptModule: its operations are fixed; convert the module it was made from")
    follow_checkpoints()
    ask_about_all_functions()
    members = {"__doc__": base.__doc__, "_acs_base": base, "forward": _with_signature(base.forward)}
    members.update(__module__=base.__module__, __qualname__=base.__qualname__)
    if hasattr(base, "__deepcopy__"):
        members["__deepcopy__"] = _deepcopy
    if issubclass(base, torch.fx.GraphModule):
        members["recompile"] = _recompile
    return type(base.__name__, (_Lifted, base), members)


def _with_signature(forward):
    """:meth:`_Lifted.forward` with the arguments of the network's own: exporters read their names."""
    own = _Lifted.forward
    function = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    function.__signature__ = inspect.signature(forward)
    return function


def _deepcopy(module, memo):
    """Copy by the class's own method, which may depend on the class (``torch.fx.GraphModule``)."""
    lifted, module.__class__ = type(module), type(module)._acs_base
    try:
        copied = copy.deepcopy(module, memo)
    finally:
        module.__class__ = lifted
    _swap_class(copied)
    copied._acs_lift = module._acs_lift
    return copied


def _recompile(module):
    """Let ``torch.fx.GraphModule`` write the forward it generates into its own class, not over the lifted one."""
    lifted, module.__class__ = type(module), type(module)._acs_base
    try:
        return module.recompile()
    finally:
        module.__class__ = lifted


def _swap_class(module: nn.Module) -> None:
    if isinstance(module, _Lifted):
        return
    if parametrize.is_parametrized(module):
        # The class on top was made for this module; removing the parametrization takes it off again.
        type(module).__bases__ = (lifted_class(type(module).__bases__[0]),)
    else:
        module.__class__ = lifted_class(type(module))


def _rebuild(rebuild, args):
    module = rebuild(*args)
    _swap_class(module)
    return module


def _contains(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    return any(isinstance(child, kinds) for child in module.modules())


def is_lifted(module: nn.Module) -> bool:
    """Whether :func:`convert` has been applied to a module."""
    return isinstance(module, _Lifted)


def convert(
    model: nn.Module,
    kind: str = "acs",
    *,
    in_channels: int | None = None,
    rules=None,
    inflation="repeat",
    axis: int = -3,
) -> nn.Module:
    """Let a 2D network take volumes: ``(N, C, D, H, W)`` in, volumes (or vectors) out.

    The modules stay the ones they are, with their state-dict keys, parameters, modes, hooks,
    dtype and device; only their classes gain a mixin. An image batch ``(N, C, H, W)`` still runs
    as in 2D. Every submodule takes volumes as well, and its hooks see volumes. A stride of the
    plane also strides depth.

    Args:
        model: a 2D network; changed in place. Native 3D modules in it stay as they are.
        kind: how a 2D convolution acts on a volume:

            * ``"acs"``: a third of its channels in each view (Yang et al., arXiv:1911.10477);
            * ``"soft"``: all channels in all views, mixed by a new parameter ``soft_w_core``
              ``(O, 3)`` next to each kernel, which starts as the mean;
            * ``"mean"``: the mean of the views;
            * ``"2.5d"``: ``(1, k, k)`` kernels, slice by slice;
            * ``"3d"``: dense ``(k, k, k)`` kernels, inflated as in I3D (Carreira & Zisserman,
              arXiv:1705.07750): each kernel becomes a 5-D parameter of the same name.
        in_channels: input channels of the first convolution; its kernel is summed over RGB for
            one channel, repeated and scaled for several. 2D checkpoints still load.
        rules: options for single layers: a mapping of name patterns (``fnmatch``) to options, of
            which the last match counts, or a function ``(name, module) -> options or None``. The
            options: ``kind``; ``split``, output channels of the three views; ``aligned``;
            ``depth_stride``, the stride along depth of a convolution or pooling, 1 to keep the
            depth of anisotropic volumes. Upsampling finds back to the depths of the way down.
        inflation: for kind "3d", ``"repeat"`` the 2D kernel and divide, or put it in the ``"centre"``.
        axis: axis of the volume across the 2D network's plane, -3 (D), -2 (H) or -1 (W): without
            a kernel in kind "2.5d", inflated along in kind "3d". The views of ACS have it at D.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument does not fit, or the network was converted to another
            kind whose parameters differ.
        LiftingError: a module whose operations cannot be seen (TorchScript). Operations without a
            meaning on volumes raise it when the network runs.
    """
    check_kind(kind)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if axis not in (-3, -2, -1):
        raise ValueError(f"axis must be -3 (D), -2 (H) or -1 (W), got {axis!r}")
    if inflation not in INFLATIONS:
        raise ValueError(f"inflation must be one of {', '.join(map(repr, INFLATIONS))}, got {inflation!r}")
    layer_rules = LayerRules(rules)
    plan = []
    mixed = _contains(model, _SOLID)
    for path, module in model.named_modules():
        if isinstance(module, _SOLID):
            continue
        # Beside 3D modules, what has no 2D ones is left as it is: it may call 3D functions.
        folds = not _contains(module, _SOLID) and not (mixed and not _contains(module, _PLANAR))
        lift = layer_rules.apply(Lift(kind, path, folds, 5 + axis, inflation), module)
        before = module._acs_lift.kind if is_lifted(module) else lift.kind
        if before != lift.kind and {before, lift.kind} & {"soft", "3d"}:
            raise ValueError(f"{path or 'model'} has kind {before!r}, whose parameters differ from kind {lift.kind!r}")
        plan.append((module, lift))
    layer_rules.check_all_used()
    adapted = None if in_channels is None else adapt_first_convolution(model, in_channels)
    inflated = {}
    for module, lift in plan:
        earlier = is_lifted(module) and module._acs_lift.adapts_channels
        _swap_class(module)
        module._acs_lift = replace(lift, adapts_channels=earlier or module is adapted)
        add_parameters(module, inflated)
    return model
