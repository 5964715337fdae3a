"""What lifting does to a network: the exact check, and a table of its operations."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten

from .errors import LiftingError
from .modules import convert, is_lifted
from .rows import describe_tensor, tensors_in
from .rules import RULES
from .run import Run


def check_lifting(model: nn.Module, example_2d: Tensor, depth: int | None = None) -> float:
    """How far the lifted network is from the 2D one, where the two must agree.

    With ``(1, k, k)`` kernels (kind "2.5d") a volume of equal slices must give the 2D network's own
    output for one slice, repeated along depth. That exercises everything but the ACS kernels:
    pooling, padding, interpolation, normalization, attention, the heads.

    Args:
        model: a 2D or a lifted network; it is copied, and the copy runs in evaluation mode.
        example_2d: an image batch ``(N, C, H, W)`` (lower-dimensional inputs have no volume).
        depth: slices of the volume; by default the smaller side of the image.

    Returns:
        The largest difference relative to the largest output, over all outputs.

    Raises:
        LiftingError: the network cannot be lifted, or gives outputs of another shape.
        ValueError: ``example_2d`` is no image batch.
    """
    if example_2d.dim() != 4:
        raise ValueError(f"example_2d must be an image batch (N, C, H, W), got shape {tuple(example_2d.shape)}")
    planar = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = planar(example_2d)
        if not is_lifted(planar):
            convert(planar, "2.5d")
        for module in planar.modules():
            if is_lifted(module):
                module._acs_lift = replace(module._acs_lift, kind="2.5d", depth_stride=None)
        depth = depth or min(example_2d.shape[2:])
        volume = example_2d.unsqueeze(planar._acs_lift.axis)
        sizes = list(volume.shape)
        sizes[planar._acs_lift.axis] = depth
        found = planar(volume.expand(sizes))
    expected, found = (
        [item for item in tree_flatten(result)[0] if isinstance(item, Tensor)] for result in (expected, found)
    )
    if len(expected) != len(found):
        raise LiftingError(f"cannot lift: {len(found)} outputs for a volume, {len(expected)} for an image")
    pairs = zip(expected, found, strict=True)
    return max((_difference(one, other, planar._acs_lift.axis) for one, other in pairs), default=0.0)


def _difference(image: Tensor, volume: Tensor, axis: int) -> float:
    if volume.dim() == image.dim() + 1:
        at = axis if image.dim() == 4 else 1
        image = image.unsqueeze(at)
        sizes = list(image.shape)
        sizes[at] = volume.shape[at]
        image = image.expand(sizes)
    if image.shape != volume.shape:
        raise LiftingError(f"cannot lift: output {tuple(volume.shape)} for a volume, {tuple(image.shape)} expected")
    if not image.numel():
        return 0.0
    image, volume = image.double(), volume.double()
    return ((image - volume).abs().max() / image.abs().max().clamp_min(1e-30)).item()


@dataclass(frozen=True)
class Operation:
    """One operation of a lifted network: where, what, what it became, shapes as volumes, FLOPs."""

    layer: str
    name: str
    action: str
    input: str
    output: str
    flops: int


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found; ``str()`` is the table that it prints.

    Attributes:
        operations: those that were rewritten, or run on each slice, in order.
        parameters: number of parameters.
        flops: of convolutions and matrix products, a multiplication and an addition counted as two.
        refusals: why the network cannot run on this volume, operation by operation; empty where it
            can. After a refusal the list goes on with what the operation does to each slice, as
            far as that goes.
    """

    operations: tuple[Operation, ...]
    parameters: int
    flops: int
    refusals: tuple[str, ...]

    @property
    def refusal(self) -> str | None:
        """The first refusal, None where there is none."""
        return self.refusals[0] if self.refusals else None

    def __str__(self) -> str:
        header = ("layer", "operation", "becomes", "input", "output", "MFLOP")
        lines = [
            (one.layer, one.name, one.action, one.input, one.output, f"{one.flops / 1e6:.1f}" if one.flops else "")
            for one in self.operations
        ]
        widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, *lines]
        ]
        actions = Counter(one.action for one in self.operations)
        table.append("")
        table += [f"{count:5d}  {action}" for action, count in actions.most_common()]
        table.append(f"parameters {self.parameters:,}; {self.flops / 1e9:.2f} GFLOP")
        table += [f"refused: {refusal}" for refusal in self.refusals] or ["nothing is refused"]
        return "\n".join(table)


def describe(model: nn.Module, example: Tensor, kind: str = "acs", *, show: bool = True) -> Description:
    """Print every operation that lifting rewrites or leaves to each slice, without computing any.

    Args:
        model: a lifted network, or a 2D one, of which a copy is converted to ``kind``.
        example: a volume ``(N, C, D, H, W)``; only its shape, dtype and device matter.
        show: False returns the description without printing it.
    """
    if example.dim() != 5:
        raise ValueError(f"example must be a volume (N, C, D, H, W), got shape {tuple(example.shape)}")
    if not is_lifted(model):
        model = convert(copy.deepcopy(model), kind)
    operations = []

    def record(run, name, args, kwargs, result):
        rule = RULES[name]
        if rule.action == "as it is":
            return
        inputs = tensors_in(args) + tensors_in(kwargs.values())
        outputs = tensors_in([result])
        operations.append(
            Operation(
                run.layer._acs_lift.path if run.layer is not None else "",
                name,
                rule.action,
                describe_tensor(inputs[0]),
                describe_tensor(outputs[0]) if outputs else "",
                _flops(run, name, inputs, outputs),
            )
        )

    refusals = []

    def go_on(run, error, rows, function, args, kwargs):
        refusals.append(str(error))
        try:
            result = function(*args, **kwargs)
        except Exception:
            raise error from None
        for tensor in tensors_in([result]):
            if rows.axis == 0 and tensor.dim() and tensor.shape[0] == rows.slices * rows.inner:
                axes = "rcpp" if tensor.dim() == 4 else "r" + "c" * (tensor.dim() - 1)
                rows.replace(axes=axes, pooled=False).put_on(tensor)
        return result

    run = Run(example.shape[0], model._acs_lift.across, record, go_on)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        volume = fake.from_tensor(example.detach())
        try:
            model(run.fold(volume))
        except Exception as error:
            if not isinstance(error, LiftingError) and not refusals:
                raise
            if isinstance(error, LiftingError) and str(error) not in refusals:
                refusals.append(str(error))
    flops = sum(one.flops for one in operations)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    description = Description(tuple(operations), parameters, flops, tuple(refusals))
    if show:
        print(description)
    return description


def _flops(run, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if name in ("conv2d", "conv_transpose2d"):
        weight = inputs[1]
        taps = weight.shape[-1] * weight.shape[-2]
        kind = run.lift.kind
        if taps > 1 and kind in ("soft", "mean"):
            taps *= 3
        elif kind == "3d":
            taps *= min(weight.shape[-2:])
        positions = outputs[0] if name == "conv2d" else inputs[0]
        return 2 * positions.numel() * weight.shape[1] * taps
    if name == "linear":
        return 2 * outputs[0].numel() * inputs[1].shape[1]
    if name in ("matmul", "bmm", "baddbmm"):
        return 2 * outputs[0].numel() * inputs[-2].shape[-1]
    if name == "scaled_dot_product_attention":
        query, key = inputs[:2]
        return 4 * query.numel() * key.shape[-2]
    return 0
