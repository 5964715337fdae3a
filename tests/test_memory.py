"""Peak memory of a training step, as PyTorch's allocator counts it, against the published ACSConv."""

import pytest
import torch

from benchmarks import memory
from benchmarks.layers import LayerCase

pytest.importorskip("acsconv.operators", reason="the published ACSConv is not installed")

CASES = [
    (LayerCase(32, 128, kernel=1, size=16), "channels_last", 0.6),
    (LayerCase(32, 32, kernel=3, size=20, soft=True), "channels_last", 0.6),
    (LayerCase(3, 32, kernel=7, size=32, stride=2), "channels_last", 0.6),
    (LayerCase(32, 32, kernel=3, size=20), "channels_last", 0.6),
    (LayerCase(64, 128, kernel=3, size=24, stride=2, batch=2), "channels_last", 0.6),
    (LayerCase(256, 256, kernel=3, size=8), "channels_last", 0.6),
    (LayerCase(96, 96, kernel=3, size=24, groups=96), "channels_last", 0.6),
    (LayerCase(48, 48, kernel=5, size=32, stride=2, groups=48), "channels_last", 0.6),
    (LayerCase(32, 32, kernel=3, size=20), "ncdhw", 0.95),
]


@pytest.mark.parametrize(("case", "layout", "share"), CASES, ids=lambda one: getattr(one, "name", None))
def test_a_step_needs_less_memory(case, layout, share):
    peaks = memory.layer(case, memory.LAYOUTS[layout])
    assert peaks["acs_triton"] <= share * peaks["acsconv"], peaks


def test_the_allocator_is_counted():
    def step():
        kept = torch.empty(2**20, dtype=torch.uint8)
        del kept
        return torch.empty(3 * 2**20, dtype=torch.uint8)

    assert memory.peak_bytes(step) == 3 * 2**20


def test_the_table(capsys):
    memory.main(["--size", "6", "--layers", "k1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| | ACSConv 0.1.1, MiB")
    assert lines[2].startswith("| 64->256 k1 6^3 |")
    assert lines[-1].startswith("| geometric mean |")
