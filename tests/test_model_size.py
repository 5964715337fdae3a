"""``python -m benchmarks.model_size``: the published claim about parameters, and the table."""

import pytest
import torch
from torch import nn

from acs_triton.lifting import convert
from benchmarks import model_size

pytest.importorskip("torchvision")


def parameters(encoder, kind):
    with torch.device("meta"):
        network = convert(model_size.ENCODERS[encoder](), model_size.KINDS[kind])
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters():
    """ACS has the 2D network's; of kernels that are mostly 3 x 3 that is a third of the 3D network's."""
    for name, encoder in model_size.ENCODERS.items():
        planar = sum(parameter.numel() for parameter in encoder().parameters())
        assert parameters(name, "ACS") == parameters(name, "2.5D") == planar
        assert planar < parameters(name, "Soft ACS") < 1.05 * planar
    assert 2.9 < parameters("ResNet-18", "3D") / parameters("ResNet-18", "ACS") < 3.1
    assert parameters("EfficientNet-b0", "3D") > 1.1 * parameters("EfficientNet-b0", "ACS")


def small():
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1))


def test_rows(monkeypatch, capsys):
    rows = {row.kind: row for row in model_size.measure("small", small, torch.randn(1, 3, 8, 9, 10), repeats=1)}
    voxels = 8 * 9 * 10
    flops = {"2.5D": 9, "ACS": 9, "Soft ACS": 27, "3D": 27}
    for kind, row in rows.items():
        assert row.flops == 2 * voxels * (12 * 3 * flops[kind] + 12 * 8)
        assert row.planar == 12 * 27 + 12 + 12 * 8 + 8
        assert row.parameters == row.planar + {"Soft ACS": 3 * (12 + 8), "3D": 2 * 12 * 27}.get(kind, 0)
        assert row.peak >= 4 * voxels * 8 + 4 * row.parameters  # the output and the gradients
        assert row.seconds > 0
    monkeypatch.setattr(model_size, "ENCODERS", {"small": small})
    model_size.main(["--size", "4", "4", "4", "--repeats", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[4:]] == list(model_size.KINDS)
    assert lines[5].startswith("| small | ACS | 440 | 1.00 |")
    with pytest.raises(SystemExit):
        model_size.main(["--size", "0", "32", "32"])
