"""Opt-in tuning (``ACS_TRITON_AUTOTUNE=1``): time other tiles than the heuristic's, remember the best.

A candidate may only win with the numbers of the heuristic's tile: some tiles are compiled into
wrong code on some GPUs. Results are keyed on sizes rounded up to powers of two and kept in one JSON
file per device and Triton version, under ``ACS_TRITON_CACHE`` or the user's cache directory, so
that each is measured once. Ranks of a distributed run that share that directory agree on entries
that exist when they start; tune once before, or ranks may choose differently.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime import driver

from ..geometry import Geometry
from . import device

Tile = TypeVar("Tile")
"""A dataclass of plain numbers: what a launch can be tuned by."""

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}
"""How far two correct tiles may differ, as a share of the value plus that of the outputs' root mean square.

Their sums are taken in another order, and rounded to the output's precision at the end."""


def enabled() -> bool:
    """Whether the environment asks for tuning (``ACS_TRITON_AUTOTUNE=1``) and there is a GPU to time."""
    return os.environ.get("ACS_TRITON_AUTOTUNE", "") not in ("", "0") and device.current().hardware


def run(
    launch: Callable[[Tile], object],
    default: Tile,
    candidates: Callable[[], Iterable[Tile]],
    kernel,
    output: torch.Tensor,
    geometry: Geometry,
    channels: tuple[int, int, int],
    **facts: object,
) -> None:
    """Launch a convolution's primitive with ``default``, or where tuning is :func:`enabled` with its best tile.

    Args:
        launch, default, kernel, output: as for :func:`choose`.
        candidates: gives the tiles to try.
        geometry: of the convolution.
        channels: samples, input channels, output channels.
        facts: what the best tile also depends on exactly.
    """
    if not enabled():
        launch(default)
        return
    samples, in_channels, out_channels = channels
    sizes = {
        "positions": samples * math.prod(geometry.output_size),
        "in": in_channels,
        "out": out_channels,
        "groups": geometry.groups,
    }
    facts = {"dtype": output.dtype, "kernel": geometry.kernel_size, "stride": geometry.stride, **facts}
    launch(choose(kernel, sizes, facts, default, candidates(), launch, output))


def choose(
    kernel,
    sizes: Mapping[str, int],
    facts: Mapping[str, object],
    default: Tile,
    candidates: Iterable[Tile],
    launch: Callable[[Tile], object],
    output: torch.Tensor,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> Tile:
    """The fastest tile whose numbers agree with the default's.

    Args:
        kernel: the jitted kernel; a change of its source makes new entries.
        sizes: what the best tile depends on smoothly; keyed on the next power of two.
        facts: what it depends on exactly (dtype, kernel size, ...); keyed as text.
        default: the heuristic's tile, trusted and always a candidate.
        candidates: tiles to try. One that does not compile or fit is passed over.
        launch: runs the kernel with a tile, writing the whole of ``output``.
        output: any strides; its contents are overwritten.
        timer: gives the milliseconds of one call; Triton's own benchmark by default.

    Returns:
        ``default`` or one of ``candidates``. During CUDA-graph capture, nothing is tried: what is
        not known yet is ``default``.
    """
    candidates = list(dict.fromkeys([default, *candidates]))
    entries = _entries(_cache_file(_device_name(output.device)))
    key = _key(kernel, sizes, facts)
    known = entries.get(key)
    for tile in candidates:
        if known is not None and _plain(tile) == known["tile"]:
            return tile
    if output.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return default
    timings = _measure(default, candidates, launch, output, timer or _triton_timer)
    best = min(timings, key=timings.__getitem__)
    entries[key] = {"tile": _plain(best), "ms": timings[best], "default_ms": timings[default]}
    _write(_cache_file(_device_name(output.device)), key, entries[key])
    return best


def _plain(tile: Tile) -> dict[str, Any]:
    """A tile as it is read back from the file."""
    return json.loads(json.dumps(dataclasses.asdict(tile)))


def _measure(default: Tile, candidates, launch, output: torch.Tensor, timer) -> dict[Tile, float]:
    launch(default)
    expected = output.clone()
    timings = {default: timer(lambda: launch(default))}
    for tile in candidates:
        if tile == default:
            continue
        output.fill_(float("nan"))
        try:
            launch(tile)
        except triton.TritonError:
            continue
        if _agree(output, expected):
            elapsed = timer(lambda tile=tile: launch(tile))
            if _agree(output, expected):  # a race need not show the first time
                timings[tile] = elapsed
    return timings


def _agree(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = TOLERANCE[expected.dtype]
    actual, expected = actual.float(), expected.float()
    scale = expected.nan_to_num(0, 0, 0).square().mean().sqrt()
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * scale.item(), equal_nan=True)


def _triton_timer(call: Callable[[], object]) -> float:
    return driver.active.get_benchmarker()(call, quantiles=[0.5])


def _key(kernel, sizes: Mapping[str, int], facts: Mapping[str, object]) -> str:
    buckets = [f"{name}<={triton.next_power_of_2(size)}" for name, size in sizes.items()]
    exact = [f"{name}={value}" for name, value in facts.items()]
    return " ".join([kernel.__name__, *exact, *buckets, f"source={kernel.cache_key[:16]}"])


def _device_name(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type


def _cache_file(device_name: str) -> Path:
    root = os.environ.get("ACS_TRITON_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "acs_triton"
    name = re.sub(r"\W+", "-", device_name)
    return Path(root) / f"tiles-{name}-triton-{triton.__version__}.json"


@lru_cache
def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """Contents of the file when first needed, and what this process has added since."""
    return _read(path)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except OSError:
        return {}
    except ValueError:
        warnings.warn(f"{path} is not valid JSON; it will be replaced by newly tuned tiles", stacklevel=2)
        return {}


def _write(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Add one entry to the file; readers see the old file or the new one, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_read(path), key: entry}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"tuned tiles are not kept: {path} cannot be written ({error})", stacklevel=2)
