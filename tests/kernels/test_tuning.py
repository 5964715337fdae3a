"""Tuning on real kernels: every family's candidates give the heuristic's numbers, and the fastest is launched.

What tuning does with times, wrong candidates and its file is tested in ``tests/test_autotune.py``.
"""

import json

import pytest

from acs_triton.backends import triton as backend
from acs_triton.kernels import autotune

from . import oracle
from .cases import LAYOUTS, Case

CASES = {
    "gather_gemm": Case(8, 9, (1, 2, 2), kernel=(2, 2), padding=(1, 0), split=(0, 9, 0), batch=1),
    "depthwise": Case(1, 1, (2, 1, 2), kernel=(2, 2), padding=(1, 0), batch=1),
    "stem": Case(2, 17, (2, 3, 2), kernel=(2, 2), padding=(1, 0), split=(0, 17, 0), batch=1),
}
LARGER = {
    # Where there is a copy engine, descriptor kernels compute these: gradients of the weight in the second.
    "gather_gemm, 32 columns": Case(32, 96, (4, 8, 8), batch=1),
    "gather_gemm, 64 columns": Case(64, 192, (4, 8, 8), batch=1),
    "gather_gemm, stride 2": Case(24, 70, (3, 6, 5), stride=(2, 2, 2), layout="ncdhw"),
    "depthwise, channels last": Case(70, 70, (5, 6, 7), groups=70),
    "depthwise, stride 2": Case(10, 10, (9, 8, 7), kernel=(5, 5), stride=(2, 2, 2), groups=10, layout="ncdhw"),
    "stem, 7x7": Case(3, 50, (9, 6, 7), kernel=(7, 7), padding=(3, 3), stride=(2, 2, 2)),
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Tuning is on, and each tile takes less time than the one before. The list of times."""
    times = []

    def timer(call):
        call()
        times.append(100.0 - len(times))
        return times[-1]

    monkeypatch.setenv("ACS_TRITON_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "enabled", lambda: True)
    monkeypatch.setattr(autotune, "_triton_timer", timer)
    autotune._entries.cache_clear()
    yield times
    autotune._entries.cache_clear()


@pytest.mark.parametrize("primitive", ["conv", "input_grad", "weight_grad"])
@pytest.mark.parametrize("family", [*CASES, *LARGER])
def test_every_candidate_agrees_and_the_fastest_is_launched(
    family, primitive, make, main_dtype, device, measured, monkeypatch, tmp_path
):
    if device.interpreted and family in LARGER:
        pytest.skip("would take minutes in the interpreter")
    case = {**CASES, **LARGER}[family]
    shapes = {"input": case.input_shape, "weight": case.weight_shape, "grad_output": case.output_shape}
    names = {
        "conv": ("input", "weight"),
        "input_grad": ("grad_output", "weight"),
        "weight_grad": ("grad_output", "input"),
    }
    operands = [
        make(shapes[name], main_dtype, seed, LAYOUTS[case.layout]) for seed, name in enumerate(names[primitive])
    ]
    rest = (None, case.geometry) if primitive == "conv" else (case.geometry,)
    launched, run = [], autotune.run

    def recorded(launch, *arguments, **facts):
        run(lambda tile: (launched.append(tile), launch(tile)), *arguments, **facts)

    monkeypatch.setattr(autotune, "run", recorded)
    if device.interpreted:  # such kernels have no hash
        monkeypatch.setattr(autotune, "_key", lambda *facts: "key")
    result = getattr(backend, primitive)(*operands, *rest)
    assert len(measured) == len(set(launched)) > 1, "a candidate disagreed with the heuristic's tile"
    assert launched[-1] == launched[-2] != launched[0]
    (entry,) = json.loads(next(tmp_path.iterdir()).read_text()).values()
    assert entry["tile"] == json.loads(json.dumps(vars(launched[-1])))
    define, magnitudes = getattr(oracle, primitive), [operand.abs() for operand in operands]
    oracle.check(result, define(*operands, *rest), define(*magnitudes, *rest), 10**3)
    launched.clear()
    assert getattr(backend, primitive)(*operands, *rest).equal(result)
    assert len(launched) == 1, "measured twice"
