"""``python -m benchmarks.memory``: peak memory of a layer's training step, against the published ACSConv 0.1.1.

What PyTorch's CPU allocator hands out is counted, inside operators too. The step is that of a layer
within a network: the forward pass, whose output is handed on and let go, then the backward pass from
the output's gradient. The input, the parameters and the output's gradient exist before and do not
count; what the step makes does, their gradients included.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from statistics import geometric_mean

import torch
from torch import nn

from .layers import LAYERS, LAYOUTS, LayerCase, build

MIB = 2**20


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that ``step`` holds at once on the CPU, above what was held before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells every start and end on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def step_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Peak of a training step of ``model`` within a network, on ``x``."""
    grad = torch.randn_like(model(x).detach())

    def step():
        output = torch.autograd.graph.get_gradient_edge(model(x))
        torch.autograd.backward(output, grad)

    step()  # what is made once and kept, such as tables, is no part of a step
    model.zero_grad()
    x.grad = None
    return peak_bytes(step)


def layer(case: LayerCase, layout: torch.memory_format) -> dict[str, int]:
    """Peak bytes of the published operator's step and of ours."""
    x = case.input(layout)
    return {name: step_bytes(build(name, case), x) for name in ("acsconv", "acs_triton")}


def table(rows: dict[str, dict[str, int]]) -> str:
    """Markdown: peaks in MiB, our share of ACSConv's, and its geometric mean."""
    lines = ["| | ACSConv 0.1.1, MiB | acs-triton, MiB | ratio |", "|---|---|---|---|"]
    ratios = {name: row["acs_triton"] / row["acsconv"] for name, row in rows.items()}
    for name, row in rows.items():
        lines.append(f"| {name} | {row['acsconv'] / MIB:.1f} | {row['acs_triton'] / MIB:.1f} | {ratios[name]:.2f} |")
    return "\n".join([*lines, f"| geometric mean | | | **{geometric_mean(ratios.values()):.2f}** |"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="channels_last", help="memory format of the input")
    parser.add_argument("--layers", default="", help="only the layers whose name contains this")
    parser.add_argument("--size", type=int, help="voxels a side of every input, instead of the layers' own")
    options = parser.parse_args(argv)
    cases = [dataclasses.replace(case, size=options.size) if options.size else case for case in LAYERS]
    rows = {case.name: layer(case, LAYOUTS[options.layout]) for case in cases if options.layers in case.name}
    print(table(rows))


if __name__ == "__main__":
    main()
