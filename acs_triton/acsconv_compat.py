"""Let ``import acsconv`` find this library, so that code written for ACSConv runs unchanged.

>>> import acs_triton.acsconv_compat as compat
>>> compat.install()
>>> from acsconv.converters import ACSConverter
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from . import converters, functional, operators


def acs_conv_f(x, weight, bias, kernel_size, dilation, padding, stride, groups, out_channels, acs_kernel_split):
    """ACSConv's function: :func:`acs_triton.functional.acs_conv3d` in its argument order.

    ``kernel_size`` and ``out_channels`` are those of ``weight``.
    """
    return functional.acs_conv3d(x, weight, bias, stride, padding, dilation, groups, tuple(acs_kernel_split))


def _same(count: int):
    def parse(value):
        values = (value,) if isinstance(value, int) else tuple(value)
        if len(set(values)) != 1:
            raise ValueError(f"the size must be the same for each side, got {value!r}")
        return values[:1] * count

    return parse


def _each(count: int):
    def parse(value):
        values = (value,) if isinstance(value, int) else tuple(value)
        if len(set(values)) == 1:
            return values[:1] * count
        if len(values) != count:
            raise ValueError(f"expected one size or {count} sizes, got {value!r}")
        return value if isinstance(value, Sequence) else values

    return parse


_UTILS = {"_pair_same": _same(2), "_triple_same": _same(3), "_to_pair": _each(2), "_to_triple": _each(3)}


def install() -> None:
    """Make ``acsconv`` and its submodules resolve to this library, for this process.

    An ``acsconv`` imported before is replaced for imports after this call.
    """
    convs = {name: getattr(operators, name) for name in ("ACSConv", "Conv2_5d", "SoftACSConv")}
    names = ("ACSConverter", "Conv2_5dConverter", "Conv3dConverter", "SoftACSConverter")
    layout = {
        "acsconv": {"__version__": "0.1.1"},
        "acsconv.utils": _UTILS,
        "acsconv.operators": {**convs, "acs_conv_f": acs_conv_f},
        "acsconv.operators.functional": {"acs_conv_f": acs_conv_f},
        "acsconv.operators.acsconv": {"ACSConv": operators.ACSConv},
        "acsconv.operators.soft_acsconv": {"SoftACSConv": operators.SoftACSConv},
        "acsconv.operators.conv2_5d": {"Conv2_5d": operators.Conv2_5d},
        "acsconv.converters": {name: getattr(converters, name) for name in names},
        "acsconv.converters.base_converter": {"BaseConverter": converters.BaseConverter},
        "acsconv.converters.acsconv_converter": {"ACSConverter": converters.ACSConverter},
        "acsconv.converters.soft_acsconv_converter": {"SoftACSConverter": converters.SoftACSConverter},
        "acsconv.converters.conv2_5d_converter": {"Conv2_5dConverter": converters.Conv2_5dConverter},
        "acsconv.converters.conv3d_converter": {"Conv3dConverter": converters.Conv3dConverter},
    }
    modules = {}
    for name, members in layout.items():
        module = modules[name] = ModuleType(name, __doc__)
        vars(module).update(members)
        if name in ("acsconv", "acsconv.operators", "acsconv.converters"):
            module.__path__ = []
    if importlib.util.find_spec(f"{__package__}.models") is not None:
        from . import models

        modules["acsconv.models"] = models
        prefix = f"{models.__name__}."
        for name in list(sys.modules):
            if name.startswith(prefix):
                modules[f"acsconv.models.{name.removeprefix(prefix)}"] = sys.modules[name]
    for name in [name for name in sys.modules if name == "acsconv" or name.startswith("acsconv.")]:
        del sys.modules[name]
    for name, module in modules.items():
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        # Submodules named like a class in them (acsconv.operators.acsconv) do not hide anything.
        if parent:
            vars(modules[parent]).setdefault(child, module)
