"""The kernel report: what it prints, writes and dumps."""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

import json
import subprocess

import pytest

triton = pytest.importorskip("triton")

from benchmarks import kernel_report, workloads

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the compiler")


@pytest.fixture
def one_layer(monkeypatch):
    monkeypatch.setattr(workloads, "TYPICAL", [workloads.Layer(64, 192)])


def test_table_figures_and_binaries_agree(one_layer, tmp_path, capsys):
    file, directory = tmp_path / "report.json", tmp_path / "binaries"
    arguments = ["--arch", "sm_80", "gfx942", "--dtype", "fp16", "--kernel", "gather_gemm"]
    assert kernel_report.main([*arguments, "--json", str(file), "--dump", str(directory)]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert tuple(heading.split()) == kernel_report.HEADINGS
    records = json.loads(file.read_text())
    assert len(lines) == len(records) == 2  # on two targets; forward and input gradient share a binary
    assert sorted(path.name for path in directory.iterdir()) == sorted(record["file"] for record in records)
    for record in records:
        assert record["kernel"] == "gather_gemm_kernel"
        prefix = f"gather_gemm_kernel-fp16-{record['tile']}-{record['arch']}"
        assert record["file"].startswith(prefix)
        (line,) = (text for text in lines if record["tile"] in text.split() and record["arch"] in text.split())
        assert f"{record['loop']}:{record['arithmetic']} {record['matrix']}" in line
        assert record["matrix"] == {"sm_80": "HMMA", "gfx942": "MFMA"}[record["arch"]]
        assert 0 < record["occupancy"] <= 1
        assert record["constants"]["BM"] in (64, 128)


def test_dumped_binaries_can_be_disassembled(one_layer, tmp_path):
    kernel_report.main(["--arch", "sm_90", "--dtype", "bf16", "--kernel", "gather_gemm", "--dump", str(tmp_path)])
    tool = triton.knobs.nvidia.cuobjdump.path
    for path in tmp_path.iterdir():
        assert path.suffix == ".cubin"
        assert "HGMMA" in subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["--arch", "sm_70"], ["--dtype", "int8"]])
def test_unknown_targets_and_dtypes_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        kernel_report.main(arguments)
    assert "invalid choice" in capsys.readouterr().err
