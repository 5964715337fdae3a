"""A 2D network as the encoder of a volume network: its feature maps at falling sizes, lifted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from itertools import pairwise
from math import log2

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..lifting import convert, is_lifted
from ..lifting.rows import tensors_in
from ..lifting.run import Run

_SIDE = 224
"""Side of the image by which a network is examined: networks of one fixed size mostly take this one."""


class Pyramid(nn.Module):
    """Feature maps of a 2D network, from the largest to the smallest.

    Args:
        network: gives maps ``(N, C, H, W)`` or ``(N, H, W, C)`` in a list, tuple or mapping: a timm
            ``features_only`` network, an encoder of segmentation-models-pytorch, or one of your
            own. Or a chain of layers that ends in a vector, as torchvision's classifiers are: the
            last map of each size is taken, and the layers behind them are removed.

    Attributes:
        network: the network, with its own state-dict keys.
        strides: side of the image over that of each map.
        channels: of each map.

    Raises:
        ValueError: it has no convolution, gives no maps at falling sizes, or is no chain of layers.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        with _evaluating(network), torch.no_grad():
            image = _image(network)
            found, outputs = _run_noting_layers(network, image)
            self._layers, self._taps = _cut(network, image, outputs) if isinstance(found, Tensor) else (None, ())
            found = self._found(image)
        # smp's encoders list the image itself, or a map without channels, where there is nothing of a size.
        self._chosen = tuple(
            index
            for index, item in enumerate(found)
            if isinstance(item, Tensor) and item.dim() == 4 and item.numel() and item is not image
        )
        maps = [found[index] for index in self._chosen]
        self._permuted = tuple(_channels_axis(item) == 3 for item in maps)
        self.channels = tuple(item.shape[_channels_axis(item)] for item in maps)
        self.strides = tuple(_SIDE / item.shape[2] for item in maps)
        if not maps or any(one >= two for one, two in pairwise(self.strides)):
            raise ValueError(
                f"encoder {type(network).__name__} must give feature maps at falling sizes; "
                f"of an image {tuple(image.shape)} it gives {[tuple(item.shape) for item in maps]}"
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = self._found(x)
        maps = zip((found[index] for index in self._chosen), self._permuted, strict=True)
        return [item.permute(0, 3, 1, 2) if permuted else item for item, permuted in maps]

    def _found(self, x: Tensor) -> list:
        if self._layers is None:
            found = self.network(x)
            return list(found.values() if isinstance(found, Mapping) else found)
        maps = []
        for path in self._layers:
            x = self.network.get_submodule(path)(x)
            if path in self._taps:
                maps.append(x)
        return maps


def _image(network: nn.Module) -> Tensor:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"encoder {type(network).__name__} has no Conv2d")
    # Numbers do not matter but where two runs are compared.
    values = torch.linspace(-1, 1, first.in_channels * _SIDE**2, dtype=first.weight.dtype, device=first.weight.device)
    return values.view(1, first.in_channels, _SIDE, _SIDE)


def _channels_axis(item: Tensor) -> int:
    return 3 if item.shape[1] == item.shape[2] != item.shape[3] else 1


def _halvings(item: Tensor) -> int:
    """How often the plane of the image has been halved."""
    return round(log2(_SIDE / item.shape[2]))


@contextmanager
def _evaluating(network: nn.Module):
    """Evaluation mode; the modes of all modules come back at the end."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run_noting_layers(network: nn.Module, image: Tensor):
    """The result, and the output of each layer of the chain that the network is, in order, by name."""
    outputs = {}

    def note(name):
        def hook(module, args, result):
            outputs[name] = result.clone() if isinstance(result, Tensor) else result

        return hook

    links = [(name, child) for name, child in network.named_children()]
    hooks = []
    while links:
        name, module = links.pop()
        if isinstance(module, nn.Sequential) and len(module):
            links += [(f"{name}.{inner}", child) for inner, child in module.named_children()]
        else:
            hooks.append(module.register_forward_hook(note(name)))
    try:
        return network(image), outputs
    finally:
        for hook in hooks:
            hook.remove()


def _cut(network: nn.Module, image: Tensor, outputs: dict[str, Tensor]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the layers up to the last map, and of those that give the last map of a size; drops all others."""
    last = {}
    for name, output in outputs.items():
        is_map = (
            isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] in (output.shape[1], output.shape[3])
        )
        # An adaptive pooling gives one size whatever it gets: the head starts there.
        if isinstance(network.get_submodule(name), (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            break
        if is_map and output.shape[2] > 1:
            last[_halvings(output)] = name
    taps, names = tuple(last.values()), list(outputs)
    layers = tuple(names[: names.index(taps[-1]) + 1]) if taps else ()
    if not layers or not _is_chain(network, image, [(name, outputs[name]) for name in layers]):
        raise ValueError(
            f"encoder {type(network).__name__} gives no list of feature maps, and cannot be cut into one: it is no "
            "chain of layers. Give a network that lists its maps, such as timm.create_model(name, features_only=True)"
        )
    for name, _ in list(network.named_children()):
        if not any(layer.split(".")[0] == name for layer in layers):
            delattr(network, name)
    return layers, taps


def _is_chain(network: nn.Module, x: Tensor, layers: list[tuple[str, Tensor]]) -> bool:
    """Whether the layers, one after another, give these outputs."""
    for name, output in layers:
        try:
            x = network.get_submodule(name)(x)
        except (RuntimeError, ValueError, TypeError):  # made for something else than the output before it
            return False
        if not isinstance(x, Tensor) or x.shape != output.shape or not torch.equal(x, output):
            return False
    return True


def lift_pyramid(pyramid: Pyramid, kind: str, in_channels: int, rules, keep_depth: int) -> Pyramid:
    """Lift an encoder in place; the first ``keep_depth`` halvings of its plane leave the depth as it is.

    Layers that cannot keep the depth because they pad it unevenly or not at all become 2.5D there.
    """
    if is_lifted(pyramid.network):
        raise ValueError("encoder is converted already; give the 2D network, and options for its layers as rules")
    if not keep_depth:
        return convert(pyramid, kind, in_channels=in_channels, rules=rules)
    keeping = _keep_depth_rules(pyramid, keep_depth)
    if callable(rules):
        convert(
            pyramid,
            kind,
            in_channels=in_channels,
            rules=lambda path, module: {**keeping.get(path, {}), **(rules(path, module) or {})},
        )
    else:
        convert(pyramid, kind, in_channels=in_channels, rules={**keeping, **(rules or {})})
    with _evaluating(pyramid), _cube(pyramid) as cube:
        maps = pyramid(cube)
    for item in maps:
        plane, depth = (round(log2(_SIDE / item.shape[axis])) for axis in (3, 2))
        if depth != max(0, plane - keep_depth):
            raise ValueError(
                f"encoder {type(pyramid.network).__name__} cannot keep the depth for {keep_depth} halvings of the "
                f"plane: it halves outside of convolutions and poolings; use spacing=None"
            )
    return pyramid


def _keep_depth_rules(pyramid: Pyramid, keep_depth: int) -> dict[str, dict]:
    """Options for the layers that shrink the plane in its first ``keep_depth`` halvings."""
    planar = convert(copy.deepcopy(pyramid), "2.5d").eval()
    rules = {}

    def record(run, name, args, kwargs, result):
        if "conv" not in name and "pool" not in name:
            return
        before, after = tensors_in(args)[0], tensors_in([result])[0]
        if not before.dim() == after.dim() == 4 or after.shape[2] == 1:
            return
        low, high = _halvings(before), _halvings(after)
        if low < min(high, keep_depth):
            stride = 2 ** max(0, high - keep_depth)
            options = rules[run.lift.path] = {"depth_stride": stride}
            if stride == 1 and isinstance(run.layer, nn.Conv2d) and not _is_centred(run.layer):
                options["kind"] = "2.5d"

    with _cube(planar) as cube:
        run = Run(1, record=record)
        planar(run.fold(cube))
    return rules


@contextmanager
def _cube(network: nn.Module):
    """A volume without numbers, whose side is that of the image."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield _image(network).unsqueeze(2).expand(-1, -1, _SIDE, -1, -1)


def _is_centred(layer: nn.Conv2d) -> bool:
    """Whether a stride of one would keep the size."""
    return all(
        2 * padding == dilation * (kernel - 1)
        for kernel, padding, dilation in zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    )
