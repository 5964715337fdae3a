"""``python -m benchmarks.kernel_report``: what the compiler makes of every kernel, without a GPU.

Compiles the kernels that the usual encoders' layers launch, for one or more targets, and prints
for each kernel, dtype and tile its registers, spills, shared memory and occupancy, and the
instructions, arithmetic and copies of its innermost loop. These are counts, not timings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import workloads
from benchmarks.disassembly import Report, inspect
from benchmarks.offline import ARCHS, Binary, offline

HEADINGS = ("kernel", "dtype", "tile", "arch", "registers", "spilled", "shared", "occupancy", "loop", "copies")


def compile_layers(
    arch: str,
    layers: Iterable[workloads.Layer],
    dtypes: Iterable[str],
    primitives: Iterable[str] = workloads.PRIMITIVES,
) -> list[tuple[str, Binary]]:
    """``(dtype, binary)`` of every distinct kernel that the layers' primitives launch."""
    found: dict[str, tuple[str, Binary]] = {}
    with offline(arch) as gpu:
        for dtype in dtypes:
            for layer in layers:
                for primitive in primitives:
                    layer.run(primitive, workloads.DTYPES[dtype], gpu.get_active_torch_device())
            for binary in gpu.binaries:
                found.setdefault(binary.digest, (dtype, binary))
    return list(found.values())


def tile_text(binary: Binary) -> str:
    """The constants a binary was compiled with, in the kernel's own words: ``bm128_bn64_bk64_w4_s3``."""
    parts = []
    for name, value in binary.constants.items():
        if value is None:
            parts.append(f"no_{name}")
        elif value is True:
            parts.append(name.lower())
        elif value is not False and value != "":
            parts.append(f"{name.lower()}{value}".replace(" ", ""))
    return "_".join([*parts, f"w{binary.num_warps}", f"s{binary.num_stages}"])


def row(dtype: str, binary: Binary, report: Report) -> tuple[str, ...]:
    arithmetic = report.matrix or "FMA"
    return (
        binary.kernel,
        dtype,
        tile_text(binary),
        binary.arch,
        str(report.registers),
        str(report.spilled),
        str(report.shared),
        f"{report.occupancy:.0%}",
        f"{report.loop}:{report.arithmetic} {arithmetic}",
        ", ".join(f"{count} {kind}" for kind, count in report.copies.items()),
    )


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in (HEADINGS, *rows)) for column in range(len(HEADINGS))]
    for line in (HEADINGS, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def dump(directory: Path, dtype: str, binary: Binary) -> Path:
    """Copy the machine code to ``<kernel>-<dtype>-<tile>-<arch>.cubin`` (``.hsaco`` for AMD)."""
    directory.mkdir(parents=True, exist_ok=True)
    source = binary.machine_code
    name = f"{binary.kernel}-{dtype}-{tile_text(binary)}-{binary.arch}"
    path = directory / f"{name}{source.suffix}"
    if path.exists():  # the same constants, specialised for other arguments
        path = directory / f"{name}-{binary.digest[:8]}{source.suffix}"
    shutil.copyfile(source, path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["sm_80", "sm_90"],
        choices=ARCHS,
        metavar="ARCH",
        help=f"targets, of {', '.join(ARCHS)} (default: sm_80 sm_90)",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=list(workloads.DTYPES),
        choices=workloads.DTYPES,
        metavar="DTYPE",
        help=f"of {', '.join(workloads.DTYPES)} (default: all)",
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write each binary there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    rows, records = [], []
    for arch in arguments.arch:
        for dtype, binary in compile_layers(arch, workloads.TYPICAL, arguments.dtype):
            if arguments.kernel not in binary.kernel:
                continue
            report = inspect(binary)
            rows.append(row(dtype, binary, report))
            record = {"kernel": binary.kernel, "dtype": dtype, "tile": tile_text(binary), "arch": arch}
            record |= {"constants": binary.constants, "num_warps": binary.num_warps, **dataclasses.asdict(report)}
            if arguments.dump:
                record["file"] = dump(arguments.dump, dtype, binary).name
            records.append(record)
    print_table(sorted(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
