"""``python -m benchmarks.compare``: layers and networks against the published ACSConv 0.1.1, in turn, in one run.

The ratio is the published operator's median time over ours. ``of limit`` is the time that the
machine needs at least for a layer's useful multiply-adds and for its tensors once through memory,
at the rates measured in the same run, over our time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import torch

from . import networks
from .layers import LAYERS, LAYOUTS, LayerCase, build
from .measure import Limits, alternate, inference, limits, training_step


def layer(case: LayerCase, layout: torch.memory_format, rounds: int, limit: Limits) -> dict:
    """Training step and inference of both operators, in milliseconds."""
    x = case.input(layout)
    models = {name: build(name, case) for name in ("acsconv", "acs_triton")}
    expected, found = (model(x).detach() for model in models.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    train = alternate({name: training_step(model, x) for name, model in models.items()}, rounds)
    infer = alternate({name: inference(model, x) for name, model in models.items()}, rounds)
    passes, moved = (2, 3) if case.is_stem else (3, 5)
    least = limit.bound(case.multiply_adds(passes), moved * 4 * max(x.numel(), found.numel()))
    return _row(case.name, train, infer) | {"of_limit": least / train["acs_triton"]}


def network(name: str, size: int, rounds: int) -> dict:
    """A network's training step: the published operator in NCDHW, ours as ``convert`` runs it."""
    pair = networks.pair(name)
    x = torch.randn(1, networks.in_channels(name), size, size, size)
    train = alternate({key: networks.training_step(model, x) for key, model in pair.items()}, rounds)
    infer = alternate({key: inference(model, x) for key, model in pair.items()}, rounds)
    return _row(f"{name} {size}^3", train, infer)


def _row(name: str, train: dict[str, float], infer: dict[str, float]) -> dict:
    row = {"name": name}
    for phase, seconds in (("train", train), ("infer", infer)):
        row |= {f"{phase}_{key}_ms": value * 1e3 for key, value in seconds.items()}
        row[f"{phase}_ratio"] = seconds["acsconv"] / seconds["acs_triton"]
    return row


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table, with the geometric mean of the ratios."""
    lines = [
        "| | ACSConv step, ms | ours, ms | ratio | ACSConv inference, ms | ours, ms | ratio | of limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        of_limit = f"{row['of_limit']:.2f}" if "of_limit" in row else ""
        cells = [
            f"{row[f'{phase}_{name}_ms']:.1f}" for phase in ("train", "infer") for name in ("acsconv", "acs_triton")
        ]
        ratios = [f"{row[f'{phase}_ratio']:.2f}" for phase in ("train", "infer")]
        cells = [row["name"], *cells[:2], ratios[0], *cells[2:], ratios[1], of_limit]
        lines.append(f"| {' | '.join(cells)} |")
    means = [f"**{geometric_mean([row[f'{phase}_ratio'] for row in rows]):.2f}**" for phase in ("train", "infer")]
    return "\n".join([*lines, f"| geometric mean | | | {means[0]} | | | {means[1]} | |"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="ncdhw", help="memory format of the layers' input")
    parser.add_argument("--layers", default="", help="only the layers whose name contains this")
    parser.add_argument(
        "--networks", nargs="*", choices=networks.NAMES, help="networks instead of layers; all by default"
    )
    parser.add_argument("--size", type=int, default=96, help="voxels a side of the networks' input")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    if options.networks is None:
        limit = limits()
        print(
            f"{options.threads} threads, {torch.__version__}: {limit.multiply_adds / 1e9:.0f} G multiply-adds/s, ",
            end="",
        )
        print(f"{limit.copied_bytes / 1e9:.1f} GB/s read and written")
        for case in LAYERS:
            if options.layers in case.name:
                rows.append(layer(case, LAYOUTS[options.layout], options.rounds, limit))
                print("  ".join(f"{value:.2f}" if isinstance(value, float) else value for value in rows[-1].values()))
    else:
        for name in options.networks or networks.NAMES:
            rows.append(network(name, options.size, options.rounds))
            print("\n".join(networks.shares(name, options.size)))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
