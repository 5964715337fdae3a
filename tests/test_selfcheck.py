"""The self-check: passes where the numbers are right, and names what is wrong where they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from acs_triton import selfcheck
from acs_triton.backends import torch as torch_backend


def broken(primitive, damage):
    """The torch backend with one primitive's result damaged."""

    def compute(*args):
        return damage(getattr(torch_backend, primitive)(*args))

    functions = {name: getattr(torch_backend, name) for name in selfcheck.PRIMITIVES}
    return SimpleNamespace(**{**functions, primitive: compute})


def check(backend, dtype=torch.float32, cases=selfcheck.CASES):
    return list(selfcheck.check_numbers(backend, "cpu", ["small"], [dtype], cases))


def not_a_number(result):
    result[..., -1] = float("nan")
    return result


def one_element(result):
    result[0, 0, 0, 1] += 0.25
    return result


def fails(result):
    raise RuntimeError("out of shared memory\nand a second line")


@pytest.mark.parametrize("dtype", [torch.float64, *selfcheck.DTYPES])
def test_right_numbers_pass(dtype):
    assert check(torch_backend, dtype) == []


@pytest.mark.parametrize("primitive", selfcheck.PRIMITIVES)
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (one_element, "has a relative error of"),
        (not_a_number, "has a relative error of inf"),
        (torch.zeros_like, "has a relative error of"),
        (fails, "does not run: RuntimeError: out of shared memory"),
    ],
)
def test_wrong_numbers_are_named(primitive, damage, text):
    cases = [case for case in selfcheck.CASES if case.name in ("standard", "depthwise")]
    found = check(broken(primitive, damage), cases=cases)
    assert len(found) == 2 * len(cases)  # each in both memory formats
    for sentence, case in zip(found[::2], cases, strict=True):
        assert sentence.startswith(f"{case.name}, small: {primitive} in float32, channels-last, ")
        assert text in sentence
        assert "\n" not in sentence


@pytest.mark.parametrize("wrong", [[], ["standard, small: conv in float16, has a relative error of 1"]])
def test_the_exit_status_says_so(monkeypatch, capsys, wrong):
    monkeypatch.setattr(selfcheck.triton_device, "why_not", lambda: "there is no GPU in this test.")
    monkeypatch.setattr(selfcheck.triton_device, "triton", None)
    monkeypatch.setattr(selfcheck, "print_speed", lambda *args: None)
    monkeypatch.setattr(selfcheck, "check_torch_backend", lambda: wrong)
    assert selfcheck.main([]) == bool(wrong)
    output = capsys.readouterr().out
    assert "The torch backend computes everything here: there is no GPU in this test.\n" in output
    assert ("All numbers are right." in output) is (not wrong)
    assert all(f"WRONG: {sentence}.\n" in output for sentence in wrong)


@pytest.mark.parametrize("dtype", [*selfcheck.DTYPES])
def test_operands_are_exact_in_every_dtype(dtype):
    operands = selfcheck.Operands.of(selfcheck.CASES[0], selfcheck.CASES[0].small, batch=2)
    for tensor in (operands.input, operands.weight, operands.bias, operands.grad_output):
        assert torch.equal(tensor.to(dtype).double(), tensor)
        # tf32 keeps the first 10 bits of the fraction.
        bits = tensor.float().view(torch.int32)
        assert not (bits & 0x1FFF).any()


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the command starts the interpreter itself")
def test_the_command():
    command = [sys.executable, "-m", "acs_triton.selfcheck", "--seconds", "0.01"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All numbers are right." in result.stdout
    for heading in ("acs_triton ", "largest relative error against float64", "nn.Conv3d", "depthwise, 5x5, stride 2"):
        assert heading in result.stdout
