"""``python -m acs_triton.selfcheck``: is what this machine computes right, and how fast is it?

Every kernel family, primitive and dtype is compared with the torch backend in float64 on the CPU.
Operands are multiples of 1/64 of at most 8 bits, which every dtype (tf32 too) holds exactly, so a
difference beyond the result's own rounding is an error and not a matter of precision.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.utils.benchmark
from torch import Tensor

from . import __version__, backends
from .arguments import conv_params, planar_params
from .backends import torch as torch_backend
from .functional import acs_conv3d
from .geometry import ConvParams, Geometry, Triple
from .kernels import device as triton_device

PRIMITIVES = ("conv", "input_grad", "weight_grad")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest error of an element, as a share of its value plus the result's root mean square."""


@dataclass(frozen=True)
class Case:
    """One convolution: channels, kernel, and a small and a large input size."""

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    small: Triple
    large: Triple
    stride: int = 1
    padding: int | tuple[int, ...] = 1
    dilation: int = 1
    groups: int = 1
    planar: bool = False
    mixed: bool = False
    activation: str = ""

    @property
    def params(self) -> ConvParams:
        common = self.kernel, self.out_channels, self.stride, self.padding, self.dilation, self.groups
        params = planar_params(*common, view=0) if self.planar else conv_params(*common, split=None)
        return params.mixed() if self.mixed else params


CASES = (
    Case("standard", 16, 24, (3, 3), (3, 4, 5), (48, 56, 40)),
    Case("standard, stride 2", 16, 32, (3, 3), (4, 5, 6), (64, 56, 72), stride=2),
    Case("odd channels, then GELU", 5, 7, (3, 3), (4, 5, 3), (40, 40, 40), activation="gelu"),
    Case("standard, dilation 2", 16, 16, (3, 3), (4, 4, 4), (40, 40, 40), padding=2, dilation=2),
    Case("grouped", 32, 48, (3, 3), (3, 4, 5), (40, 40, 40), groups=2),
    Case("1x1, stride 2", 24, 40, (1, 1), (3, 4, 5), (56, 64, 48), stride=2, padding=0),
    Case("2.5D", 16, 16, (3, 3), (3, 4, 5), (40, 48, 48), planar=True),
    Case("soft", 16, 24, (3, 3), (3, 4, 5), (48, 56, 40), mixed=True),
    Case("soft, stride 2", 16, 16, (3, 3), (4, 5, 3), (64, 56, 72), stride=2, mixed=True),
    Case("depthwise", 24, 24, (3, 3), (3, 4, 5), (56, 48, 64), groups=24),
    Case("depthwise, 5x5, stride 2", 24, 24, (5, 5), (4, 5, 3), (64, 64, 48), stride=2, padding=2, groups=24),
    Case("depthwise, then SiLU", 24, 24, (3, 3), (3, 4, 2), (56, 48, 64), groups=24, activation="silu"),
    Case("stem, 7x7, stride 2", 3, 16, (7, 7), (7, 6, 5), (64, 64, 64), stride=2, padding=3),
)

WIDE = (
    Case("standard, 64 columns", 64, 192, (3, 3), (4, 5, 6), (40, 24, 24)),
    Case("standard, 128 columns", 96, 300, (3, 3), (4, 5, 6), (24, 24, 24)),
    Case("standard, few positions", 256, 256, (3, 3), (2, 3, 2), (4, 4, 4)),
)
"""Layers that take the larger tiles, or share a tile's steps; too much work for the interpreter."""


@dataclass(frozen=True)
class Operands:
    """The tensors of one convolution and its backward pass, in float64 on the CPU."""

    geometry: Geometry
    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor
    activation: str

    @classmethod
    def of(cls, case: Case, size: Triple, batch: int) -> Operands:
        generator = torch.Generator().manual_seed(0)

        def exact(*shape: int) -> Tensor:
            return torch.randint(-128, 129, shape, generator=generator).double() / 64

        geometry = case.params.geometry(size)
        return cls(
            geometry,
            exact(batch, case.in_channels, *size),
            exact(case.out_channels, case.in_channels // case.groups, *((3,) if case.mixed else ()), *case.kernel),
            exact(case.out_channels),
            exact(batch, case.out_channels, *geometry.output_size),
            case.activation,
        )

    def compute(self, backend: ModuleType, primitive: str, dtype: torch.dtype, device, channels_last: bool) -> Tensor:
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        to = {"dtype": dtype, "device": device}
        if primitive == "conv":
            input = self.input.to(**to, memory_format=layout)
            operands = input, self.weight.to(**to), self.bias.to(**to)
            if self.activation:
                return backend.conv_act(*operands, self.activation, self.geometry)
            return backend.conv(*operands, self.geometry)
        grad = self.grad_output.to(**to, memory_format=layout)
        if primitive == "input_grad":
            return backend.input_grad(grad, self.weight.to(**to), self.geometry)
        return backend.weight_grad(grad, self.input.to(**to, memory_format=layout), self.geometry)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of an element as a share of its value plus the root mean square; inf where it is not a number."""
    difference = (actual.double().cpu() - expected).abs()
    scale = expected.abs() + expected.square().mean().sqrt() + torch.finfo(torch.float64).tiny
    return (difference / scale).nan_to_num(float("inf")).max().item()


def check_numbers(
    backend: ModuleType,
    device,
    sizes: Iterable[str],
    dtypes: Iterable[torch.dtype],
    cases: Iterable[Case] = CASES,
    thorough: bool = True,
) -> Iterator[str]:
    """Print one line per case and size; yield a plain sentence for each number that is wrong.

    Args:
        backend: a module with the three primitives.
        device: where it computes.
        sizes: any of ``"small"`` and ``"large"``.
        thorough: a batch of two and both memory formats for each dtype; otherwise one and one.
    """
    for case in cases:
        for size in sizes:
            operands = Operands.of(case, getattr(case, size), batch=2 if thorough else 1)
            worst = dict.fromkeys(dtypes, 0.0)
            for primitive in PRIMITIVES:
                expected = operands.compute(torch_backend, primitive, torch.float64, "cpu", False)
                for number, dtype in enumerate(worst):
                    for channels_last in (True, False) if thorough else (number % 2 == 0,):
                        where = f"{case.name}, {size}: {primitive} in {_text(dtype)}, "
                        where += "channels-last" if channels_last else "contiguous"
                        try:
                            actual = operands.compute(backend, primitive, dtype, device, channels_last)
                        except Exception as error:  # whatever it is, the user should read it beside the others
                            yield f"{where}, does not run: {type(error).__name__}: {str(error).splitlines()[0]}"
                            continue
                        error = relative_error(actual, expected)
                        worst[dtype] = max(worst[dtype], error)
                        if error > TOLERANCE[dtype]:
                            allowed = TOLERANCE[dtype]
                            yield f"{where}, has a relative error of {error:.1e}; at most {allowed:.0e} is right"
            figures = "  ".join(f"{_text(dtype)} {error:.0e}" for dtype, error in worst.items())
            print(f"  {case.name:<26} {size:<6} {figures}", flush=True)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


LAYERS = (
    Case("standard", 32, 32, (3, 3), (24, 24, 24), (96, 96, 96)),
    Case("standard, deep", 96, 96, (3, 3), (12, 12, 12), (32, 32, 32)),
    Case("depthwise", 96, 96, (3, 3), (24, 24, 24), (64, 64, 64), groups=96),
    Case("stem, 7x7, stride 2", 3, 32, (7, 7), (32, 32, 32), (128, 128, 128), stride=2, padding=3),
)


def print_speed(device, size: str, dtype: torch.dtype, seconds: float) -> None:
    """Print the time of forward and backward of some layers, beside what else computes or replaces them.

    Args:
        size: ``"small"`` or ``"large"``.
        seconds: spent on each figure.
    """
    print(f"\nForward and backward in milliseconds, {_text(dtype)}, channels-last, batch 2 (medians)")
    print(f"  {'':<22}{'acs_triton':>12}{'torch backend':>15}{'nn.Conv3d':>12}{'ACSConv 0.1':>13}")
    for layer in LAYERS:
        geometry = layer.params.geometry(getattr(layer, size))
        generator = torch.Generator().manual_seed(0)
        shape = (2, layer.in_channels, *geometry.input_size)
        input = torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last_3d)
        input.requires_grad_()
        weight = torch.randn(layer.out_channels, layer.in_channels // layer.groups, *layer.kernel, generator=generator)
        weight = weight.to(device, dtype).requires_grad_()
        dense = weight.detach().unsqueeze(2).repeat(1, 1, layer.kernel[0], 1, 1).requires_grad_()
        arguments = layer.stride, layer.padding, layer.dilation, layer.groups
        figures = []
        for backend, operator, kernel in (
            ("auto", lambda x, w, given=arguments: acs_conv3d(x, w, None, *given), weight),
            ("torch", lambda x, w, given=arguments: acs_conv3d(x, w, None, *given), weight),
            ("auto", lambda x, w, given=arguments: torch.nn.functional.conv3d(x, w, None, *given), dense),
            ("auto", _published(layer), weight),
        ):
            with backends.use_backend(backend):
                figures.append("-" if operator is None else f"{_milliseconds(operator, input, kernel, seconds):.2f}")
        print(f"  {layer.name:<22}{figures[0]:>12}{figures[1]:>15}{figures[2]:>12}{figures[3]:>13}", flush=True)


def _published(layer: Case) -> Callable | None:
    if importlib.util.find_spec("acsconv") is None:
        return None
    from acsconv.operators.functional import acs_conv_f

    def operator(input, weight):
        triple = layer.kernel[0], layer.dilation, layer.padding, layer.stride
        kernel, dilation, padding, stride = ((value,) * 3 for value in triple)
        split = layer.params.split
        return acs_conv_f(
            input, weight, None, kernel, dilation, padding, stride, layer.groups, layer.out_channels, split
        )

    return operator


def _milliseconds(operator: Callable, input: Tensor, weight: Tensor, seconds: float) -> float:
    grad = torch.ones_like(operator(input, weight))

    def step() -> None:
        torch.autograd.grad(operator(input, weight), (input, weight), grad)

    step()
    timer = torch.utils.benchmark.Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def check_kernels() -> list[str]:
    """Check the Triton kernels where they can be launched: print a table, return a sentence for each wrong number."""
    from .backends import triton as triton_backend

    where = triton_device.current()
    print(f"\nTriton kernels {'interpreted' if where.interpreted else f'for {where.arch}'}: {_HEADING}")
    sizes, cases = (("small", "large"), CASES + WIDE) if where.hardware else (("small",), CASES)
    return list(check_numbers(triton_backend, where.torch_device, sizes, DTYPES, cases, thorough=where.hardware))


def check_torch_backend() -> list[str]:
    """The same for the torch backend on the CPU."""
    print(f"\nTorch backend on the CPU: {_HEADING}")
    return [
        *check_numbers(torch_backend, "cpu", ("small",), DTYPES),
        *check_numbers(torch_backend, "cpu", ("large",), (torch.float32,), CASES[:1]),
    ]


_HEADING = "largest relative error against float64"
_INTERPRETED = "from acs_triton import selfcheck; raise SystemExit(selfcheck.report(selfcheck.check_kernels()))"


def report(wrong: list[str]) -> int:
    """Print the sentences; the exit status that they ask for."""
    for sentence in wrong:
        print(f"WRONG: {sentence}.")
    return int(bool(wrong))


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status is 1 if a number is wrong or something that should run does not."""
    parser = argparse.ArgumentParser(prog="python -m acs_triton.selfcheck", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each figure of the table of speed")
    seconds = parser.parse_args(argv).seconds

    reason = triton_device.why_not()
    hardware = reason is None and triton_device.current().hardware
    machine = torch.cuda.get_device_name() if hardware else f"{platform.machine()} CPU"
    triton = triton_device.triton.__version__ if triton_device.triton else "not installed"
    print(f"acs_triton {__version__}, torch {torch.__version__}, Triton {triton}, {machine}")
    if reason is None:
        failed = report(check_kernels())
        if hardware:
            print_speed(triton_device.current().torch_device, "large", torch.float16, seconds)
    else:
        print(f"The torch backend computes everything here: {reason.rstrip('.')}.", flush=True)
        interpreter = None
        if triton_device.triton:
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            # Rows of a tile that are not stored may hold anything, which the interpreter multiplies with warnings.
            command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", _INTERPRETED]
            interpreter = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        failed = report(check_torch_backend())
        if interpreter:
            print(interpreter.communicate()[0], end="")
            failed |= interpreter.returncode != 0
            if interpreter.returncode not in (0, 1):
                print(f"WRONG: the interpreted kernels stopped with exit status {interpreter.returncode}.")
        print_speed("cpu", "small", torch.float32, seconds)
    if failed:
        print("\nSome numbers are wrong; please report the lines that begin with WRONG.")
        if reason is None:
            print("Until then, ACS_TRITON_BACKEND=torch computes without the kernels.")
    else:
        print("\nAll numbers are right.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
