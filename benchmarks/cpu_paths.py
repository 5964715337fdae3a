"""``python -m benchmarks.cpu_paths``: what it costs to follow the cost model of the CPU's convolutions.

For every layer of a sweep both gradients are timed in each form, and as ``acs_triton.backends.cpu_cost`` chooses,
piece by piece; those of depthwise layers as ``acs_triton.backends.depthwise`` computes them. Printed are the choice's
time and its time over that of the best form.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from statistics import geometric_mean

import torch

from acs_triton.arguments import conv_params
from acs_triton.backends import cpu_cost
from acs_triton.backends import torch as torch_backend

from .layers import LAYOUTS
from .measure import alternate

STANDARD = tuple(product((8, 16, 32, 64, 128), (3,), (1, 2), (8, 16, 32), (1, 2)))
DEEP = tuple(product((64, 128, 256, 512), (3,), (1, 2), (2, 3, 4, 6), (1, 2)))
DEPTHWISE = tuple(product((32, 96, 240), (3, 5, 7), (1, 2), (8, 16, 32), (1,)))
STEMS = ((3, 3, 2, 64, 1), (3, 7, 2, 48, 1), (3, 7, 2, 64, 1))
MOST_VOXELS = 4_000_000  # input channels times voxels times batch


def _volume(plan: cpu_cost.Plan, *_, sliced: bool = False) -> cpu_cost.Plan:
    others = dict.fromkeys(("depthwise", "by_columns", "converted", "by_taps"), False)
    return replace(plan, **others, sliced=(sliced,) * len(plan.sliced))


def _slices(plan: cpu_cost.Plan, *_) -> cpu_cost.Plan:
    return _volume(plan, sliced=True)


def _converted(plan: cpu_cost.Plan, *_) -> cpu_cost.Plan:
    return replace(plan, depthwise=False, by_columns=False, converted=True)


def _by_columns(plan: cpu_cost.Plan, *_) -> cpu_cost.Plan:
    return replace(plan, depthwise=False, by_columns=True)


FORMS = {"volume": _volume, "slices": _slices, "columns": _by_columns, "converted": _converted, "not exchanged": None}
"""What becomes of the plan; None where only the operands' exchange is put off."""


@contextmanager
def forced(form: str):
    """Gradients in this block take one form wherever it is possible."""
    changed, plan, exchanged = FORMS[form], cpu_cost.plan, cpu_cost.exchanged
    if changed is None:
        cpu_cost.exchanged = lambda *_: False
    else:
        cpu_cost.plan = lambda *args: changed(plan(*args), *args)
    try:
        yield
    finally:
        cpu_cost.plan, cpu_cost.exchanged = plan, exchanged


def measure(channels: int, kernel: int, stride: int, size: int, batch: int, grouped: bool, layout, rounds: int) -> dict:
    """Median seconds of both gradients by each form."""
    out, groups = (channels, channels) if grouped else (max(channels, 32), 1)
    params = conv_params((kernel, kernel), out, stride, kernel // 2, 1, groups, None)
    geometry = params.geometry((size,) * 3)
    x = torch.randn(batch, channels, size, size, size).contiguous(memory_format=layout)
    grad = torch.randn(batch, out, *geometry.output_size).contiguous(memory_format=layout)
    weight = torch.randn(out, channels // groups, kernel, kernel)
    needed = weight if channels > 4 else None  # a stem's input is an image

    def step():
        torch_backend.gradients(grad, x, needed, geometry)

    def of(form):
        def run():
            with forced(form):
                step()

        return run

    # Of channels-last memory there is nothing to convert, and columns of many positions would fill the memory.
    useless = {"converted"} if layout == torch.channels_last_3d else set()
    useless |= {"columns"} if grouped or size > 6 else set()
    useless |= {"not exchanged"} if grouped else set()
    forms = [form for form in FORMS if form not in useless]
    return alternate({"chosen": step} | {form: of(form) for form in forms}, rounds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_paths", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sweep = [(*layer, False) for layer in (*STEMS, *STANDARD, *DEEP)] + [(*layer, True) for layer in DEPTHWISE]
    losses = []
    for (channels, kernel, stride, size, batch, grouped), (name, layout) in product(sweep, LAYOUTS.items()):
        if batch * channels * size**3 > MOST_VOXELS:
            continue
        times = measure(channels, kernel, stride, size, batch, grouped, layout, options.rounds)
        losses.append(times["chosen"] / min(times.values()))
        text = ", ".join(f"{form} {seconds * 1e3:.2f} ms" for form, seconds in times.items())
        kind = "depthwise" if grouped else "standard"
        print(f"{channels} {kind} k{kernel} s{stride} {size}^3 b{batch} {name}: {text}, chosen/best {losses[-1]:.2f}")
    within = sum(loss <= 1.1 for loss in losses)
    print(f"geometric mean of chosen/best {geometric_mean(losses):.3f}; within 10 %: {within} of {len(losses)}")


if __name__ == "__main__":
    main()
