"""Runs ``tests/kernels`` where no GPU is: interpreted, and on an emulated GPU if there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).parent / "kernels"
EMULATOR = importlib.util.find_spec("emulated_gpu")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, str(KERNELS)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    result = subprocess.run(command, env=env, cwd=KERNELS.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_interpreted():
    run("-n", "auto", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # Python's work: a process for every core


@pytest.mark.emulated
@pytest.mark.skipif(EMULATOR is None, reason="emulated_gpu is not on PYTHONPATH")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_emulated(capability):
    run("-p", "emulated_gpu", EMULATED_SM=capability)
