"""Tuning: with a kernel, a clock and candidates that are made up, so that what must win is known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from acs_triton.kernels import autotune


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int = 4
    box: tuple = (2, 4)


DEFAULT, SLOW, FAST = Tile(64), Tile(32), Tile(128)
MILLISECONDS = {64: 2.0, 32: 3.0, 128: 1.0}


class Bench:
    """A kernel whose output and duration depend on its tile, and what was launched and timed."""

    def __init__(self, dtype=torch.float16, faults=None):
        generator = torch.Generator().manual_seed(0)
        self.truth = torch.randn(40, 30, generator=generator).to(dtype)
        self.output = torch.empty_like(self.truth)
        self.faults = faults or {}
        self.launched, self.timed = [], []
        self.kernel = SimpleNamespace(__name__="kernel", cache_key="0123456789abcdef")

    def launch(self, tile):
        self.launched.append(tile)
        self.output.copy_(self.truth)
        if fault := self.faults.get(tile):
            fault(self.output)

    def timer(self, call):
        call()
        self.timed.append(self.launched[-1])
        return MILLISECONDS[self.launched[-1].rows]

    def choose(self, candidates=(SLOW, FAST), rows=1000, dtype="fp16"):
        return autotune.choose(
            self.kernel, {"rows": rows}, {"dtype": dtype}, DEFAULT, candidates, self.launch, self.output, self.timer
        )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACS_TRITON_CACHE", str(tmp_path / "tiles"))
    autotune._entries.cache_clear()
    yield tmp_path / "tiles"
    autotune._entries.cache_clear()


def _skewed(output):
    output.mul_(1.05)


def _tail_unwritten(output):
    output[-1] = float("nan")


def _one_element(output):
    output[3, 4] += 0.5


def _does_not_fit(output):
    raise OutOfResources(300000, 232448, "shared memory")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)], ids=["unset", "empty", "0", "1"]
)
@pytest.mark.parametrize("hardware", [True, False], ids=["GPU", "no GPU"])
def test_enabled_by_the_environment_where_there_is_a_gpu(monkeypatch, value, expected, hardware):
    monkeypatch.delenv("ACS_TRITON_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune.device, "current", lambda: SimpleNamespace(hardware=hardware))
    if value is not None:
        monkeypatch.setenv("ACS_TRITON_AUTOTUNE", value)
    assert autotune.enabled() is (expected and hardware)


def test_the_fastest_wins():
    assert Bench().choose() == FAST
    assert Bench().choose(candidates=[SLOW], rows=5000) == DEFAULT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fault", [_skewed, _tail_unwritten, _one_element])
def test_a_wrong_candidate_cannot_win_and_is_not_timed(fault, dtype):
    bench = Bench(dtype, faults={FAST: fault})
    assert bench.choose() == DEFAULT
    assert FAST not in bench.timed


def test_a_candidate_that_goes_wrong_while_it_is_timed_cannot_win():
    passes = iter([False])

    def after_the_first_launch(output):
        if next(passes, True):
            _one_element(output)

    assert Bench(faults={FAST: after_the_first_launch}).choose() == DEFAULT


def test_a_candidate_that_does_not_fit_is_passed_over():
    assert Bench(faults={SLOW: _does_not_fit}).choose() == FAST


def test_another_order_of_summation_is_not_wrong():
    def rounding(output):
        output.copy_(output.float().mul(1 + 2**-10))

    assert Bench(faults={FAST: rounding}).choose() == FAST


def test_other_errors_are_not_hidden():
    def illegal_access(output):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Bench(faults={FAST: illegal_access}).choose()


@pytest.mark.parametrize("new_process", [False, True], ids=["same process", "new process"])
def test_measured_once(new_process):
    Bench().choose()
    if new_process:
        autotune._entries.cache_clear()
    again = Bench()
    assert again.choose(rows=1024) == FAST  # the same bucket as 1000
    assert not again.launched


def test_buckets_facts_and_source_are_told_apart():
    Bench().choose()
    for change in ({"rows": 1025}, {"dtype": "bf16"}):
        other = Bench()
        other.choose(**change)
        assert other.timed, change
    edited = Bench()
    edited.kernel.cache_key = "fedcba9876543210"
    edited.choose()
    assert edited.timed


def test_a_tile_that_is_no_candidate_any_more_is_measured_anew():
    Bench().choose()
    again = Bench()
    assert again.choose(candidates=[SLOW]) == DEFAULT
    assert again.timed


def test_the_file_is_replaced_whole_and_keeps_what_other_processes_added(cache):
    Bench().choose()
    (file,) = cache.iterdir()
    assert "triton" in file.name
    entries = json.loads(file.read_text())
    (entry,) = entries.values()
    assert entry == {"tile": {"rows": 128, "warps": 4, "box": [2, 4]}, "ms": 1.0, "default_ms": 2.0}
    file.write_text(json.dumps({**entries, "of another process": {"tile": {"rows": 1}}}))
    Bench().choose(rows=10)
    assert len(json.loads(file.read_text())) == 3
    assert list(cache.iterdir()) == [file]  # no temporary file stays


def test_a_damaged_file_is_reported_and_replaced(cache):
    Bench().choose()
    (file,) = cache.iterdir()
    file.write_text("{")
    autotune._entries.cache_clear()
    with pytest.warns(UserWarning, match="not valid JSON"):
        assert Bench().choose() == FAST
    assert len(json.loads(file.read_text())) == 1


def test_without_a_place_to_write_the_choice_still_holds(cache):
    cache.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert Bench().choose() == FAST
    again = Bench()
    assert again.choose() == FAST
    assert not again.launched
