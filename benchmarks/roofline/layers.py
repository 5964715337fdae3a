"""The convolutions of a network, and what computes each: this library's kernels, and ACSConv 0.1.1's chain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import acs_triton.models
from acs_triton.arguments import conv_params
from acs_triton.backends import triton as triton_backend
from acs_triton.geometry import ConvParams, Geometry, Triple

from ..workloads import PRIMITIVES
from .launches import Launch, Operation, record


@dataclass(frozen=True)
class Layer:
    """A convolution of a network.

    Attributes:
        size: of the input volume.
        planar: a 1x1 convolution at stride 1, which a lifted network leaves to PyTorch's ``conv2d`` on slices.
    """

    in_channels: int
    out_channels: int
    params: ConvParams
    size: Triple
    batch: int = 1
    bias: bool = False
    planar: bool = False

    @property
    def geometry(self) -> Geometry:
        return self.params.geometry(self.size)

    @property
    def depthwise(self) -> bool:
        return self.params.groups == self.in_channels > 1

    @property
    def name(self) -> str:
        ku, kv = self.params.kernel_size
        size = f"{self.size[0]}^3" if len(set(self.size)) == 1 else "x".join(map(str, self.size))
        parts = [f"{self.in_channels}->{self.out_channels}", f"k{ku}" if ku == kv else f"k{ku}x{kv}"]
        parts += [f"s{self.params.stride[0]}"] * (max(self.params.stride) > 1) + ["dw"] * self.depthwise
        return " ".join([*parts, size] + [f"b{self.batch}"] * (self.batch > 1))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the input, the weight and the output."""
        weight = (self.out_channels, self.in_channels // self.params.groups, *self.params.kernel_size)
        output = (self.batch, self.out_channels, *self.geometry.output_size)
        return (self.batch, self.in_channels, *self.size), weight, output

    @property
    def multiply_adds(self) -> int:
        """Of each primitive, those with padding zeros included."""
        _, weight, output = self.shapes
        return math.prod(output) * math.prod(weight[1:])

    def least_bytes(self, primitive: str, dtype: torch.dtype) -> int:
        """Bytes that a primitive must move: each value that it needs is read once, each result written once."""
        x, weight, output = (math.prod(shape) for shape in self.shapes)
        read = self._positions_read() * self.batch
        return (
            dtype.itemsize
            * {
                "conv": read + weight + output,
                "input_grad": output + weight + x,
                "weight_grad": output + read + weight,
            }[primitive]
        )

    def _positions_read(self) -> int:
        """Values of one input volume that some tap of some channel reads."""
        geometry = self.geometry
        union, total = np.zeros(self.size, bool), 0
        for view, first, end in geometry.views:
            mask = np.zeros(self.size, bool)
            positions = [sorted({tap[axis] for tap in geometry.taps(view)}) for axis in range(3)]
            mask[np.ix_(*(_reached(geometry, axis, positions[axis]) for axis in range(3)))] = True
            total += int(mask.sum()) * (end - first)
            union |= mask
        # A channel of a depthwise layer is read in one view only.
        return total * self.in_channels // self.out_channels if self.depthwise else int(union.sum()) * self.in_channels


def _reached(geometry: Geometry, axis: int, taps: Sequence[int]) -> np.ndarray:
    at = np.arange(geometry.output_size[axis])[:, None] * geometry.stride[axis] + np.array(taps)
    return np.unique(at[(at >= 0) & (at < geometry.input_size[axis])])


class _Calls(TorchDispatchMode):
    """Counts the primitives that a network calls, layer by layer."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch
        self.calls: Counter[tuple[Layer, str]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("acs_triton::")
        if name in _OURS:
            primitives, tensors = _OURS[name]
            shapes = dict(zip(tensors, (getattr(arg, "shape", arg) for arg in args), strict=False))
            params = ConvParams.from_args(args[len(tensors) :])
            in_channels = shapes["x"][1] if "x" in shapes else shapes["weight"][1] * params.groups
            out_channels = shapes["weight"][0] if "weight" in shapes else shapes["grad"][1]
            size = tuple(shapes["x"][2:] if "x" in shapes else shapes["size"])
            self._add(primitives, Layer(in_channels, out_channels, params, size, self.batch), shapes.get("bias"))
        elif name == "aten::convolution":
            x, weight, bias, *_, groups = args
            self._planar(PRIMITIVES[:1], x, weight, groups, bias)
        elif name == "aten::convolution_backward":
            _, x, weight, *_, groups, mask = args
            self._planar(
                [name for name, wanted in zip(PRIMITIVES[1:], mask, strict=False) if wanted], x, weight, groups
            )
        elif function.namespace == "acs_triton":
            raise NotImplementedError(f"the network calls {name}, which the report does not know")
        return function(*args, **(kwargs or {}))

    def _add(self, primitives: Sequence[str], layer: Layer, bias: object) -> None:
        biased = replace(layer, bias=True)
        if bias is not None or (biased, "conv") in self.calls:  # the gradients' calls do not tell
            layer = biased
        self.calls.update((layer, primitive) for primitive in primitives)

    def _planar(self, primitives, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None) -> None:
        if x.dim() != 4 or tuple(weight.shape[2:]) != (1, 1):
            return
        params = conv_params((1, 1), weight.shape[0], 1, 0, 1, groups, None)
        size = (x.shape[0] // self.batch, *x.shape[2:])
        layer = Layer(weight.shape[1] * groups, weight.shape[0], params, size, self.batch, planar=True)
        self._add(primitives, layer, bias)


_OURS = {
    "conv": (("conv",), ("x", "weight", "bias")),
    "input_grad": (("input_grad",), ("grad", "weight", "size")),
    "weight_grad": (("weight_grad",), ("grad", "x")),
    "gradients": (("input_grad", "weight_grad"), ("grad", "x", "weight")),
}
"""The primitives that each registered operator computes, and its arguments before the convolution's parameters."""


def network(name: str) -> tuple[nn.Module, int]:
    """A network of :data:`NETWORKS`, lifted, without storage, and its input channels."""
    with torch.device("meta"):
        if name == "unet":
            return acs_triton.models.ACSUNet(2), 1
        import torchvision

        return acs_triton.convert(torchvision.models.get_model(name)), 3


NETWORKS = ("resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "unet")


def calls(name: str, size: Triple, batch: int) -> Counter[tuple[Layer, str]]:
    """How often a training step of a network calls each primitive of each layer; nothing is computed."""
    model, channels = network(name)
    with _Calls(batch) as counter:
        model(torch.empty(batch, channels, *size, device="meta")).sum().backward()
    return counter.calls


def _layer(channels: int, size: int, batch: int = 1, groups: int = 1) -> Layer:
    params = conv_params((3, 3), channels, 1, 1, 1, groups, None)
    return Layer(channels, channels, params, (size,) * 3, batch)


SINGLE = (_layer(64, 32), _layer(128, 16, 2), _layer(256, 8, 4), _layer(96, 32, groups=96))
"""Single layers: few channels, many channels, depthwise."""


def single_calls() -> Counter[tuple[Layer, str]]:
    """Each primitive of :data:`SINGLE` once."""
    return Counter({(layer, primitive): 1 for layer in SINGLE for primitive in PRIMITIVES})


def ours(layer: Layer, primitive: str, dtype: torch.dtype, where: torch.device) -> list[Launch | Operation]:
    """What this library launches for a primitive, tensors in channels-last memory.

    Raises:
        NotImplementedError: the kernels do not compute it.
    """
    if layer.planar:
        return _planar(layer, primitive, dtype)
    x, weight, output = layer.shapes
    to = {"dtype": dtype, "device": where}
    x, grad = (torch.empty(shape, **to, memory_format=torch.channels_last_3d) for shape in (x, output))
    weight = torch.empty(weight, **to)
    bias = torch.empty(layer.out_channels, **to) if layer.bias else None
    arguments = {"conv": (x, weight), "input_grad": (grad, weight), "weight_grad": (grad, x)}[primitive]
    reason = triton_backend.why_not(primitive, *arguments, layer.geometry)
    if reason is not None:
        raise NotImplementedError(f"{layer.name} {primitive} goes to PyTorch: {reason}")
    if primitive == "conv":
        return record(lambda: triton_backend.conv(x, weight, bias, layer.geometry))
    events = record(lambda: getattr(triton_backend, primitive)(*arguments, layer.geometry))
    return events + _bias_grad(layer, dtype) if primitive == "weight_grad" else events


def _bias_grad(layer: Layer, dtype: torch.dtype) -> list[Operation]:
    grad = torch.empty(layer.shapes[2], dtype=dtype, device="meta")
    return record(lambda: grad.sum((0, 2, 3, 4))) if layer.bias else []


def _planar(layer: Layer, primitive: str, dtype: torch.dtype) -> list[Operation]:
    x, weight, output = (torch.empty(shape, dtype=dtype, device="meta") for shape in layer.shapes)
    common = None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, layer.params.groups
    weight = weight.unsqueeze(2)
    if primitive == "conv":
        bias = torch.empty(layer.out_channels, dtype=dtype, device="meta") if layer.bias else None
        return record(lambda: torch.ops.aten.convolution(x, weight, bias, *common[1:]))
    mask = [primitive == "input_grad", primitive == "weight_grad", False]
    events = record(lambda: torch.ops.aten.convolution_backward(output, x, weight, *common, mask))
    return events + _bias_grad(layer, dtype) if primitive == "weight_grad" else events


def published(layer: Layer, primitives: Sequence[str], dtype: torch.dtype) -> list[Operation]:
    """What ACSConv 0.1.1's operator computes, in the ``(N, C, D, H, W)`` memory of its users.

    ``primitives`` are those of the forward pass (``("conv",)``) or of the backward pass.

    Raises:
        NotImplementedError: that package cannot compute the layer.
    """
    from acsconv.operators.functional import acs_conv_f

    x, weight, output = (torch.empty(shape, dtype=dtype, device="meta") for shape in layer.shapes)
    bias = torch.empty(layer.out_channels, dtype=dtype, device="meta") if layer.bias else None
    params = layer.params
    d, h, _, w = params.padding_low
    dilation = (params.dilation[0], params.dilation[1], params.dilation[3])
    kernel = (params.kernel_size[0],) * 3
    options = kernel, dilation, (d, h, w), params.stride, params.groups, layer.out_channels, params.split
    wanted = {"input_grad": [x], "weight_grad": [weight] + [bias] * layer.bias}
    sources = [tensor.requires_grad_() for name in primitives for tensor in wanted.get(name, [])]

    def forward():
        return acs_conv_f(x, weight, bias, *options)

    try:
        y = forward()
    except (AssertionError, RuntimeError) as error:
        raise NotImplementedError(f"ACSConv cannot compute {layer.name}: {error}") from error
    if params.padding_low != params.padding_high or len(set(params.kernel_size)) > 1 or y.shape != output.shape:
        raise NotImplementedError(f"ACSConv computes something else for {layer.name}")
    if not sources:
        return record(forward)
    return record(lambda: torch.autograd.grad(y, sources, output, retain_graph=True))
