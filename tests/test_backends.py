"""Choosing a backend, and what the torch backend leaves undone."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from acs_triton import backends, current_backend, explain, use_backend
from acs_triton.functional import acs_conv3d, soft_acs_conv3d


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(call):
    # Below the registered operators, where the torch backend's own calls are seen.
    seen = Counter()
    original = backends.torch_backend.conv

    def conv(*args):
        with Counts() as counts:
            result = original(*args)
        seen.update(counts.names)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.torch_backend, "conv", conv)
        patch.setattr(backends, "small_plan", lambda *args: None)
        call()
    return seen


def convolutions(seen):
    return sum(seen[name] for name in ("convolution", "mkldnn_convolution", "bmm"))


def tensors(channels=4, out=6, k=3, groups=1):
    return torch.randn(1, channels, 8, 8, 8), torch.randn(out, channels // groups, k, k), torch.randn(out)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {}, {"stride": 2}])
@pytest.mark.parametrize("large", [False, True])
def test_no_pads_or_crops_are_copied(monkeypatch, options, large):
    if large:
        monkeypatch.setattr(backends.torch_backend, "_SMALL", 0)
    x, weight, bias = tensors()
    seen = counted(lambda: acs_conv3d(x, weight, bias, **options))
    assert convolutions(seen) == 3
    assert (seen["copy_"], seen["cat"]) == ((3, 0) if large else (0, 1))  # parts of a large result are written into it
    assert not set(seen) & {"constant_pad_nd", "clone", "add", "add_"}, seen


@pytest.mark.parametrize("stride", [1, 2])
def test_a_pointwise_layer_is_one_convolution(stride):
    x, weight, bias = tensors(k=1)
    seen = counted(lambda: acs_conv3d(x, weight, bias, stride=stride))
    assert convolutions(seen) == 1
    assert seen["copy_"] == 0


def test_depthwise_is_three_convolutions():
    x, weight, bias = tensors(channels=6, groups=6)
    seen = counted(lambda: acs_conv3d(x, weight, bias, padding=1, groups=6))
    assert (convolutions(seen), seen["copy_"], seen["constant_pad_nd"]) == (3, 0, 0)


def test_soft_has_nineteen_taps_where_the_views_share_a_grid(monkeypatch):
    kernels = []
    original = backends.torch_backend.conv
    monkeypatch.setattr(backends.torch_backend, "conv", lambda *args: kernels.append(args[1]) or original(*args))
    x, weight, bias = tensors()
    soft_acs_conv3d(x, weight, torch.rand(6, 3), bias, padding=1)
    mixed, *planes = kernels
    assert mixed.shape[2:] == (3, 3, 3)
    assert sum(kernel[0, 0].numel() for kernel in planes) == 19


def test_use_backend_sets_and_restores():
    before = current_backend()
    with use_backend("torch"):
        assert current_backend() == "torch"
        with use_backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "torch"
    assert current_backend() == before
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert current_backend() == before
    use_backend("torch")
    assert current_backend() == "torch"
    use_backend(before)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_environment_variable():
    code = "import acs_triton; print(acs_triton.current_backend())"
    assert run(code, ACS_TRITON_BACKEND="torch").stdout.strip() == "torch"
    wrong = run(code, ACS_TRITON_BACKEND="fast")
    assert wrong.returncode == 1
    assert (
        "environment variable ACS_TRITON_BACKEND must be one of 'auto', 'torch', 'triton', got 'fast'" in wrong.stderr
    )


def test_cpu_tensors_do_not_import_triton():
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nfrom acs_triton.operators import ACSConv\n"
        "ACSConv(3, 4, 3)(torch.zeros(1, 3, 4, 4, 4)).sum().backward()\n"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] == 'triton'))"
    )
    result = run(code, ACS_TRITON_BACKEND="auto")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_explain_of_mixed_views():
    x, weight, _ = tensors()
    with use_backend("torch"):
        assert explain(x, weight, padding=1, soft=True) == explain(x, weight, padding=1)
        # ACSConv repeats a view's only plane here: no single convolution does that.
        repeated = explain(x[:, :, :2], weight, stride=2, padding=2, soft=True)
    assert repeated.count("so for each of the three views") == 3


def test_explain_names_backend_and_reason():
    x, weight, _ = tensors()
    with use_backend("auto"):
        lines = explain(x, weight, padding=1).splitlines()
    assert [line.split()[0] for line in lines] == ["conv", "input_grad", "weight_grad"]
    assert all(line.endswith("torch: the tensors are on the CPU") for line in lines)
    with use_backend("torch"):
        assert "the backend is set to 'torch'" in explain(x, weight)
    with pytest.raises(ValueError, match="input has 3 channels"):
        explain(x[:, :3], weight)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton drives the CPU here")
def test_triton_forced_on_a_cpu_says_why_it_cannot():
    pytest.importorskip("triton")
    x, weight, _ = tensors()
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"the backend is set to 'triton', but .*use_backend\('auto'\)"):
            acs_conv3d(x, weight)
        assert "torch: " in explain(x, weight)


def test_a_missing_triton_is_one_clear_sentence():
    code = (
        "import sys; sys.modules['triton'] = None\nimport torch\nfrom acs_triton.functional import acs_conv3d\n"
        "acs_conv3d(torch.zeros(1, 3, 5, 5, 5), torch.zeros(3, 3, 3, 3))"
    )
    assert run(code, ACS_TRITON_BACKEND="auto").returncode == 0
    forced = run(code, ACS_TRITON_BACKEND="triton")
    assert forced.returncode == 1
    assert "RuntimeError: the backend is set to 'triton', but Triton is not installed" in forced.stderr
