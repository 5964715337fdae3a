"""``python -m benchmarks.roofline.emulated``: the single layers' bounds with what only running kernels tells.

Instruction issue and shared memory are no part of a launch's plan. Here some programs of every launch run,
compiled, on an emulated GPU (a module ``emulated_gpu`` on ``PYTHONPATH``) that counts warp instructions
and shared-memory wavefronts; the other resources are counted as in :mod:`benchmarks.roofline`. Bounds
from counts, not timings: instructions are those of PTX without moves, four a cycle and multiprocessor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from triton.runtime import driver

from acs_triton.backends import triton as triton_backend

from ..offline import ARCHS
from ..workloads import PRIMITIVES
from . import layers
from .bounds import BOTTLENECKS, GPUS, Gpu, Row, steps_of
from .launches import Launch
from .layers import Layer

RESOURCES = (*BOTTLENECKS, "issue", "shared memory")


def run(layer: Layer, primitive: str) -> None:
    """Compute a primitive in float16, channels-last."""
    x, weight, output = (torch.ones(shape, dtype=torch.float16) for shape in layer.shapes)
    x, output = (one.contiguous(memory_format=torch.channels_last_3d) for one in (x, output))
    if primitive == "conv":
        triton_backend.conv(x, weight, None, layer.geometry)
    elif primitive == "input_grad":
        triton_backend.input_grad(output, weight, layer.geometry)
    else:
        triton_backend.weight_grad(output, x, layer.geometry)


def times(gpu: Gpu, layer: Layer, primitive: str, log: list) -> Iterator[tuple[float, ...]]:
    """Seconds that each of :data:`RESOURCES` needs, for each launch and operation of a primitive."""
    events = layers.ours(layer, primitive, torch.float16, driver.active.get_active_torch_device())
    first = len(log)
    # Sums over what the programs left out did not write must not meet NaN, which the emulator takes for a race.
    with mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros):
        run(layer, primitive)
    counters = iter(log[first:])
    sms = ARCHS[gpu.arch].multiprocessors
    for event in events:
        for _, step in steps_of(event):
            if isinstance(event, Launch):
                *_, counts = next(counters)
                share = min(1.0, event.programs / sms)
                cycles = gpu.clock * sms * share
                issued = sum(counts["issued"].values()) - counts["issued"].get("move", 0)
                wavefronts = sum(kind["wavefronts"] for kind in counts["shared"].values())
                yield *gpu.times(step.work, share), issued / 4 / cycles, wavefronts / cycles
            else:
                yield *gpu.times(step.work), 0.0, 0.0


def main(argv: Sequence[str] | None = None) -> None:
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline.emulated", description=summary)
    parser.add_argument("--gpu", choices=("a100", "h100"), default="h100")
    parser.add_argument("--programs", type=int, default=24, help="of each launch that run; the rest is extrapolated")
    parser.add_argument("--layers", default="", help="only those whose name contains this")
    options = parser.parse_args(argv)
    import emulated_gpu

    gpu = GPUS[options.gpu]
    emulated_gpu.install(int(gpu.arch.removeprefix("sm_")), profile=True, sample=options.programs)
    print(f"Microseconds on {gpu.name}, counted, not measured; 'bound': each launch's largest, summed\n")
    print(f"{'layer':24}{'pass':14}" + "".join(f"{name:>15}" for name in (*RESOURCES, "bound", "over floor")))
    for layer in layers.SINGLE:
        if options.layers not in layer.name:
            continue
        backward = [0.0, 0.0]
        for primitive in PRIMITIVES:
            launches = list(times(gpu, layer, primitive, emulated_gpu.LOG))
            bound = sum(map(max, launches))
            least = layer.least_bytes(primitive, torch.float16)
            floor = Row(layer, primitive, 1, least, [], None).floor(gpu, torch.float16)
            columns = [f"{sum(one) * 1e6:15.2f}" for one in (*zip(*launches, strict=True), [bound])]
            print(f"{layer.name:24}{primitive:14}" + "".join(columns) + f"{bound / floor:15.2f}", flush=True)
            if primitive != "conv":
                backward = [backward[0] + bound, backward[1] + floor]
        print(f"{layer.name:24}{'both grads':14}{backward[0] * 1e6:105.2f}{backward[0] / backward[1]:15.2f}")


if __name__ == "__main__":
    main()
