"""``python -m benchmarks.roofline``: work and traffic of a network's convolutions, and the times these bound.

For each layer: the multiply-adds that the chosen tiles make, the bytes that must move and those that
move, the traffic of the L2 cache, and the shortest time that a GPU's data sheet allows for them;
beside it the same for the published ACSConv 0.1.1. Nothing is run or timed: counts come from the
launches that the library's launchers make, and bounds from counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..workloads import DTYPES, PRIMITIVES
from . import layers
from .bounds import GPUS, Gpu, Row, bound, counting, moved, rows

ASSUMPTIONS = """\
Counted, not measured. Assumptions:
* Bounds: a launch takes as long as the busiest of tensor cores, FMA units, L2 and DRAM at the data sheet's
  rate ({gpu}: {matrix:.0f} TFLOP/s matrix, {scalar:.1f} TFLOP/s float32, L2 64 bytes a cycle and multiprocessor
  = {l2:.1f} TB/s, DRAM {dram:.2f} TB/s), its work spread evenly over at most as many multiprocessors as it has
  programs. Launches and operations follow each other; launching costs nothing, and no time is lost in latency,
  registers, shared memory or instruction issue. On sm_90 mma.sync is taken to be as fast as wgmma.
* DRAM: each launch or operation reads each value that it needs once and writes each result once, caches
  large enough; "least" is that for the layer's own tensors alone, "ours" adds packed weights, partial sums and copies.
* L2: 32-byte sectors of each warp's requests; loads through L1 once a program, 16-byte asynchronous copies always.
* Ours: {dtype}, channels-last. 1x1 convolutions at stride 1 are PyTorch's in a lifted network: one operation,
  nothing padded, no L2 traffic.
* ACSConv 0.1.1: every PyTorch operation that its operator makes, forward and backward, in (N, C, D, H, W) memory,
  operands that are not contiguous copied first, as PyTorch does; no padded multiply-adds, no L2 traffic, no layout
  conversions inside cuDNN: a lower bound in its favour.
"""


HEADINGS = (
    "layer", "calls", "pass", "GMAC", "padded", "least MB", "ours MB", "ACSConv MB", "ratio", "L2 MB",
    "ours us", "by", "ACSConv us", "ratio", "over floor",
)  # fmt: skip
_PASSES = {"conv": "forward", "input_grad": "input gradient", "weight_grad": "weight gradient"}


def line(label: Sequence[str], group: Sequence[Row], gpu: Gpu, dtype: torch.dtype) -> tuple[str, ...]:
    """One line of the table: one row, once, or the sum of several, each as often as it is called."""
    times = [row.calls for row in group] if len(group) > 1 else [1]

    def total(value) -> float:
        return sum(n * value(row) for n, row in zip(times, group, strict=True))

    useful, padded, least = (
        total(value) for value in (lambda r: r.layer.multiply_adds, lambda r: r.padded, lambda r: r.least)
    )
    ours_bytes = total(lambda row: moved(row.ours))
    l2 = total(lambda row: row.work.loaded + row.work.stored)
    seconds = total(lambda row: bound(row.ours, gpu, dtype)[0])
    by = bound([step for row in group for step in row.ours for _ in range(row.calls)], gpu, dtype)[1]
    theirs = [""] * 4
    if all(row.published is not None for row in group):
        their_bytes = total(lambda row: moved(row.published))
        their_seconds = total(lambda row: bound(row.published, gpu, dtype)[0])
        theirs = [
            f"{their_bytes / 1e6:.1f}",
            f"{ours_bytes / their_bytes:.2f}",
            f"{their_seconds * 1e6:.1f}",
            f"{their_seconds / seconds:.2f}",
        ]
    return (
        *label,
        f"{useful / 1e9:.2f}",
        f"{padded / useful:.2f}",
        f"{least / 1e6:.1f}",
        f"{ours_bytes / 1e6:.1f}",
        *theirs[:2],
        f"{l2 / 1e6:.1f}" if l2 else "",
        f"{seconds * 1e6:.1f}",
        by,
        *theirs[2:],
        f"{seconds / total(lambda row: row.floor(gpu, dtype)):.2f}",
    )


def report(found: Sequence[Row], gpu: Gpu, dtype: torch.dtype, smallest: float = 0.002) -> str:
    """The table and its sums. Rows below a share of the whole bound are only in the sums."""
    whole = sum(row.calls * bound(row.ours, gpu, dtype)[0] for row in found)
    shown = [row for row in found if row.calls * bound(row.ours, gpu, dtype)[0] >= smallest * whole]
    lines = [line((row.layer.name, str(row.calls), _PASSES[row.primitive]), [row], gpu, dtype) for row in shown]
    # Sums compare like with like: without the layers that ACSConv cannot compute.
    both = [row for row in found if row.published is not None]
    for label, primitives in (("forward", PRIMITIVES[:1]), ("backward", PRIMITIVES[1:]), ("step", PRIMITIVES)):
        group = [row for row in both if row.primitive in primitives]
        if len(group) > 1:
            lines.append(line(("sum", "", label), group, gpu, dtype))
        kernels = [row for row in group if not row.layer.planar]
        if len(kernels) < len(group):
            lines.append(line(("sum of the kernels'", "", label), kernels, gpu, dtype))
    three = [row for row in both if row.layer.params.kernel_size == (3, 3) and not row.layer.depthwise]
    if len(three) > 1:
        lines.append(line(("sum of dense 3x3", "", "step"), three, gpu, dtype))
    widths = [max(len(cells[column]) for cells in (HEADINGS, *lines)) for column in range(len(HEADINGS))]
    text = []
    for cells in (HEADINGS, *lines):
        parts = [
            cell.ljust(width) if column in (0, 2, 11) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        text.append("  ".join(parts).rstrip())
    if len(shown) < len(found):
        text.append(
            f"left out, but for the sums: {len(found) - len(shown)} rows of less than {smallest:.1%} of the bound"
        )
    ideal, theirs = (
        sum(row.calls * bound(steps(row), gpu, dtype)[0] for row in both)
        for steps in (lambda row: row.ideal, lambda row: row.published)
    )
    text.append(
        f"a step like for like, on both sides without padding, L2 and idle multiprocessors: "
        f"ours {ideal * 1e6:.1f} us, ACSConv {theirs * 1e6:.1f} us, ratio {theirs / ideal:.2f}"
    )
    text += [
        f"left out of the sums, ACSConv cannot compute it: {row.layer.name}" for row in found if row.published is None
    ]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--network", choices=(*layers.NETWORKS, "layers"), default="resnet18", help="'layers': a few by themselves"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", default=[96], metavar="N", help="of the volume: one edge, or D H W"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    options = parser.parse_args(argv)
    if len(options.size) not in (1, 3) or min(*options.size, options.batch, 1) < 1:
        parser.error(f"--size takes one or three positive numbers and --batch one, got {options.size}, {options.batch}")
    size = tuple(options.size * (3 // len(options.size)))
    gpu, dtype = GPUS[options.gpu], DTYPES[options.dtype]
    if options.network == "layers":
        calls = layers.single_calls()
        title = "Single layers"
    else:
        calls = layers.calls(options.network, size, options.batch)
        title = f"{options.network}, volumes {options.batch} x {' x '.join(map(str, size))}"
    with counting(gpu):
        figures = {
            "matrix": gpu.matrix * 2e-12,
            "scalar": gpu.scalar * 2e-12,
            "l2": gpu.l2 * 1e-12,
            "dram": gpu.dram * 1e-12,
        }
        print(f"{title}, {options.dtype}, {gpu.name}\n")
        print(report(rows(calls, dtype), gpu, dtype) + "\n")
        print(ASSUMPTIONS.format(gpu=gpu.name, dtype=options.dtype, **figures), end="")


if __name__ == "__main__":
    main()
