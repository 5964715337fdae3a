"""ACSConv's converters, with its calls, over :func:`acs_triton.lifting.convert`.

``ACSConverter(model)`` wraps the network; attributes and calls go through to ``.model``, which is
the network itself, lifted in place.
"""

from __future__ import annotations

from torch import nn

from .lifting import convert
from .operators import ACSConv, Conv2_5d, SoftACSConv


class BaseConverter:
    """What the converters share. A subclass sets ``kind`` and calls :meth:`convert_module`.

    Attributes:
        model: the converted network.
        kind: the kind of :func:`~acs_triton.lifting.convert`.
        converter_attributes: attributes of the converter itself; all others are the network's.
        target_conv: the native module that computes as the converted 2D convolutions do.
    """

    converter_attributes = ("model",)
    kind: str | None = None
    target_conv: type[nn.Module] | None = None

    def __init__(self, model: nn.Module):
        self.model = self.convert_module(model)

    def convert_module(self, module: nn.Module, **options) -> nn.Module:
        """Lift ``module`` in place and return it."""
        if self.kind is None:
            raise TypeError(f"{type(self).__name__} converts to no kind; use a subclass, or set its attribute 'kind'")
        return convert(module, self.kind, **options)

    def __getattr__(self, name):
        if name in type(self).converter_attributes or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.model, name)

    def __setattr__(self, name, value):
        if name in type(self).converter_attributes:
            object.__setattr__(self, name, value)
        else:
            setattr(self.model, name, value)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __repr__(self):
        return f"{type(self).__name__}(\n{self.model!r}\n)"


class ACSConverter(BaseConverter):
    """Every 2D convolution becomes an ACS convolution.

    >>> import torch
    >>> network = ACSConverter(torch.nn.Conv2d(3, 6, 3, padding=1))
    >>> network(torch.zeros(1, 3, 4, 5, 6)).shape
    torch.Size([1, 6, 4, 5, 6])
    """

    kind = "acs"
    target_conv = ACSConv


class SoftACSConverter(BaseConverter):
    """Every 2D convolution becomes a soft ACS convolution, or the mean of the views (``mean=True``)."""

    converter_attributes = ("model", "mean", "kind")
    target_conv = SoftACSConv

    def __init__(self, model: nn.Module, mean: bool = False):
        self.mean = mean
        self.kind = "mean" if mean else "soft"
        super().__init__(model)


class Conv2_5dConverter(BaseConverter):
    """Every 2D convolution becomes a ``(1, k, k)`` convolution.

    Args:
        unsqueeze_axis: axis of the volume without a kernel: -3 (D), -2 (H) or -1 (W).
    """

    converter_attributes = ("model", "unsqueeze_axis")
    kind = "2.5d"
    target_conv = Conv2_5d

    def __init__(self, model: nn.Module, unsqueeze_axis: int = -3):
        self.unsqueeze_axis = unsqueeze_axis
        self.model = self.convert_module(model, axis=unsqueeze_axis)

    def load_state_dict(self, state_dict, strict: bool = True, unsqueeze_axis: int | None = None):
        """Load 2D kernels, or ACSConv's 5-D ones; ``unsqueeze_axis`` is read off their shapes."""
        return self.model.load_state_dict(state_dict, strict)


class Conv3dConverter(BaseConverter):
    """Every 2D convolution becomes a dense ``(k, k, k)`` one.

    Args:
        i3d_repeat_axis: axis of the volume along which the 2D kernels are repeated and divided:
            -3 (D, also the default), -2 (H) or -1 (W). ACSConv draws new kernels by default;
            here the network keeps what it learned.
    """

    kind = "3d"
    target_conv = nn.Conv3d

    def __init__(self, model: nn.Module, i3d_repeat_axis: int | None = None):
        self.model = self.convert_module(model, axis=-3 if i3d_repeat_axis is None else i3d_repeat_axis)

    def load_state_dict(self, state_dict, strict: bool = True, i3d_repeat_axis: int | None = None):
        """Load 5-D kernels, or 2D ones, which are inflated along the axis of the conversion."""
        return self.model.load_state_dict(state_dict, strict)
