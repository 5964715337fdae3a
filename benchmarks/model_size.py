"""``python -m benchmarks.model_size``: parameters, work, memory and time of 2D encoders, lifted in each way.

Parameters are counted, FLOPs are counted from the shapes (a multiplication and an addition are two),
the peak memory of a forward and backward pass is what PyTorch's CPU allocator hands out, and its
time is the median of a few on this machine's CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from acs_triton.lifting import convert, describe

from .memory import MIB, peak_bytes

KINDS = {"2.5D": "2.5d", "ACS": "acs", "Soft ACS": "soft", "3D": "3d"}


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 up to its last feature map."""
    from torchvision.models import resnet18

    return nn.Sequential(*list(resnet18().children())[:-2])


def efficientnet_b0() -> nn.Module:
    """torchvision's EfficientNet-b0 up to its last feature map."""
    from torchvision.models import efficientnet_b0

    return efficientnet_b0().features


ENCODERS = {"ResNet-18": resnet18, "EfficientNet-b0": efficientnet_b0}


class Row(NamedTuple):
    """One encoder, lifted in one way.

    Attributes:
        parameters: learnt numbers; ``planar`` is that of the 2D network.
        flops: of one volume's forward pass, in convolutions and matrix products.
        peak: most bytes of a forward and backward pass, gradients included, parameters not.
        seconds: median time of a training step; None where it was not taken.
    """

    encoder: str
    kind: str
    parameters: int
    planar: int
    flops: int
    peak: int
    seconds: float | None


def measure(name: str, make: Callable[[], nn.Module], volume: torch.Tensor, repeats: int) -> Iterator[Row]:
    """The rows of one encoder, for a training step on ``volume``."""
    for label, kind in KINDS.items():
        torch.manual_seed(0)
        network = make()
        planar = sum(parameter.numel() for parameter in network.parameters())
        described = describe(convert(network, kind), volume, show=False)

        def step(network=network):
            network(volume).square().mean().backward()

        step()  # the first one also builds what later ones find
        network.zero_grad()
        peak = peak_bytes(step)
        seconds = []
        for _ in range(repeats):
            network.zero_grad()
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        yield Row(
            name, label, described.parameters, planar, described.flops, peak, median(seconds) if seconds else None
        )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| encoder | kind | parameters | of the 2D network's | GFLOP forward | peak MiB a step | seconds a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        lines.append(
            f"| {row.encoder} | {row.kind} | {row.parameters:,} | {row.parameters / row.planar:.2f} "
            f"| {row.flops / 1e9:.2f} | {row.peak / MIB:.0f} | {seconds} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_size", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--size", type=int, nargs=3, default=(64, 64, 64), metavar=("D", "H", "W"), help="of the volume"
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed; 0 for none")
    parser.add_argument("--encoder", choices=ENCODERS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    options = parser.parse_args(argv)
    if min(options.size) < 1 or options.repeats < 0:
        parser.error(f"--size must be positive and --repeats at least 0, got {options.size} and {options.repeats}")
    if options.threads:
        torch.set_num_threads(options.threads)
    volume = torch.randn(1, 3, *options.size)
    rows = []
    for name in options.encoder or ENCODERS:
        rows += measure(name, ENCODERS[name], volume, options.repeats)
    size = " x ".join(map(str, options.size))
    print(f"Volume 1 x 3 x {size}, float32, PyTorch {torch.__version__}, {torch.get_num_threads()} CPU threads\n")
    print(table(rows))


if __name__ == "__main__":
    main()
