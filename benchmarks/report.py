"""``python -m benchmarks.report FILE [--plot PNG]``: what pytest-benchmark wrote (``--benchmark-json``), as a table.

A row is a layer or network, a layout and a phase; a column an implementation, in median
milliseconds, and over ours in brackets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

OURS = "acs_triton"


def rows(results: dict) -> dict[tuple[str, str, str], dict[str, dict]]:
    """``(layer, layout, phase)`` to the ``extra_info`` of each implementation."""
    grouped: dict[tuple[str, str, str], dict[str, dict]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        dtype = info.get("dtype", "float32")
        phase = info["phase"] if dtype == "float32" else f"{info['phase']} {dtype}"
        grouped.setdefault((info["layer"], info["layout"], phase), {})[info["implementation"]] = info
    return grouped


def table(results: dict) -> str:
    """The results as a Markdown table, under a line that says what ran them."""
    grouped = rows(results)
    names = sorted({name for row in grouped.values() for name in row}, key=lambda name: (name != OURS, name))
    machine = results["machine_info"]
    devices = {info["device"] for row in grouped.values() for info in row.values() if "device" in info}
    lines = [
        f"{', '.join(sorted(devices))}; {machine['cpu'].get('brand_raw', machine['processor'])}, "
        f"{machine['cpu'].get('count', '?')} cores; {results['datetime'][:10]}",
        "",
        "| layer | layout | phase | " + " | ".join(names) + " | ours, GFLOP/s | GB/s |",
        "|---" * (5 + len(names)) + "|",
    ]
    for (layer, layout, phase), row in sorted(grouped.items()):
        ours = row.get(OURS)
        cells = [layer, layout, phase]
        for name in names:
            if name not in row:
                cells.append("")
            elif name == OURS or ours is None:
                cells.append(f"{row[name]['median_ms']:.2f}")
            else:
                cells.append(f"{row[name]['median_ms']:.2f} ({row[name]['median_ms'] / ours['median_ms']:.2f})")
        for rate, ceiling in (("gflops", "peak_gflops"), ("gbytes_per_s", "copy_gbytes_per_s")):
            cells.append(f"{ours[rate]:.0f} of {ours[ceiling]:.0f}" if ours and rate in ours else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Draw, for each layout and phase, the implementations' time over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped = rows(results)
    panels = sorted({(layout, phase) for _, layout, phase in grouped})
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        shown = {layer: row for (layer, *rest), row in grouped.items() if tuple(rest) == panel and OURS in row}
        names = sorted({name for row in shown.values() for name in row} - {OURS})
        for index, name in enumerate(names):
            having = [position for position, row in enumerate(shown.values()) if name in row]
            values = [row[name]["median_ms"] / row[OURS]["median_ms"] for row in shown.values() if name in row]
            axis.bar([position + 0.8 * index / len(names) for position in having], values, 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=7)
        axis.set_ylabel("time over ours")
        axis.set_title(" ".join(panel), fontsize=9)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="the JSON that pytest-benchmark wrote")
    parser.add_argument("--plot", type=Path, help="also draw the times over ours to this PNG")
    options = parser.parse_args(argv)
    results = json.loads(options.file.read_text())
    print(table(results))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
