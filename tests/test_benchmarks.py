"""The benchmarks run, and say what they measured."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import compare, cpu_paths, layers, measure, overhead, report

pytest.importorskip("acsconv")
TINY = layers.LayerCase(8, 8, kernel=3, size=6)


@pytest.mark.parametrize("case", [TINY, layers.LayerCase(8, 8, kernel=3, size=6, soft=True)], ids=["acs", "soft"])
def test_all_implementations_of_a_layer_agree(case):
    x = case.input()
    names = set(layers.IMPLEMENTATIONS) - {"reference_compiled", "conv3d"}
    results = [layers.build(name, case)(x) for name in sorted(names)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_multiply_adds():
    assert TINY.multiply_adds() == 6**3 * 8 * 8 * 9
    assert layers.LayerCase(48, 48, kernel=5, stride=2, size=32, groups=48).multiply_adds() == 16**3 * 48 * 25
    assert layers.LayerCase(4, 4, kernel=3, size=5, soft=True).multiply_adds(3) == 3 * 5**3 * 4 * 4 * 19


def test_steps_are_timed_in_turn():
    seen = []
    steps = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = measure.alternate(steps, rounds=4)
    assert set(times) == set("abc")
    assert [set(seen[turn : turn + 3]) for turn in range(0, 15, 3)] == [set("abc")] * 5


def test_a_training_step_gives_every_gradient():
    model, x = layers.build("acs_triton", TINY), TINY.input()
    measure.training_step(model, x)()
    assert all(tensor.grad is not None for tensor in (x, *model.parameters()))
    assert not layers.LAYERS[0].input().requires_grad  # an image


def test_compare_prints_both_times_and_their_ratio(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compare, "LAYERS", (TINY,))
    monkeypatch.setattr(compare, "limits", lambda: measure.Limits(1e11, 1e10))
    compare.main(["--rounds", "1", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["train_ratio"] == pytest.approx(row["train_acsconv_ms"] / row["train_acs_triton_ms"])
    assert f"| {TINY.name} |" in capsys.readouterr().out


def test_a_network_with_both_operators():
    row = compare.network("resnet18", 64, rounds=1)
    assert row["train_acsconv_ms"] > 0 < row["infer_acs_triton_ms"]


def test_forced_paths_and_the_chosen_one_give_one_result():
    for form in cpu_paths.FORMS:
        with cpu_paths.forced(form):
            times = cpu_paths.measure(8, 3, 1, 6, 1, False, torch.contiguous_format, rounds=1)
        assert set(times) == {"chosen", *cpu_paths.FORMS}


def test_overhead_counts_what_a_call_costs():
    times = overhead.per_call(rounds=1)
    assert set(times) == {"forward", "forward and backward"}
    assert all(value > 0 for phase in times.values() for value in phase.values())


def test_the_library_is_imported_without_what_takes_long():
    code = (
        "import sys, torch; before = set(sys.modules); import acs_triton; "
        "print({'sympy', 'triton', 'torchvision'} & (set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_suite_and_its_report(tmp_path):
    pytest.importorskip("pytest_benchmark")
    results, picture = tmp_path / "results.json", tmp_path / "picture.png"
    command = ["-m", "pytest", "benchmarks/test_layers.py", "--benchmark-only", "-q", f"--benchmark-json={results}"]
    chosen = "256_256_k3_8 and channels_last and infer and not compiled"
    subprocess.run([sys.executable, *command, "-k", chosen], check=True, capture_output=True)
    report.main([str(results), "--plot", str(picture)])
    (row,) = report.rows(json.loads(results.read_text())).values()
    assert set(row) == {"acs_triton", "acsconv", "reference", "conv3d"}
    assert picture.stat().st_size > 10_000
