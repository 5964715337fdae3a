"""What the compiler made of a kernel: registers, spills, and the loop that does the arithmetic.

Machine code comes from the tools inside the triton package: ``cuobjdump`` for NVIDIA, LLVM's own
assembly for AMD. Loops are natural loops of the control-flow graph, so waiting loops and blocks
that the assembler moved out of line are attributed as they execute.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from triton import knobs

from benchmarks.offline import ARCHS, Binary


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; ``target`` is the index of the instruction that it may branch to."""

    opcode: str
    operands: str = ""
    target: int | None = None
    falls_through: bool = True


@dataclass(frozen=True)
class Report:
    """Figures of one binary.

    Attributes:
        registers: 32-bit registers a lane (AMD: vector registers, accumulators included).
        spilled: bytes of registers a lane keeps in memory and reads back.
        shared: bytes of shared memory a block.
        occupancy: resident warps as a share of what the device holds.
        matrix: the matrix instruction's family (``"HMMA"``, ``"HGMMA"``, ``"UTCHMMA"``, ``"MFMA"``)
            or None where the kernel has none.
        loop: instructions in one pass of the innermost loop that does most of the arithmetic; of
            the whole kernel where nothing loops.
        arithmetic: matrix instructions among them; multiply-adds where there are no matrix ones.
        copies: moves of global memory in that loop, by kind and bytes a lane, e.g.
            ``{"async 16": 12, "load 4": 2, "tma": 2}``.
    """

    registers: int
    spilled: int
    shared: int
    occupancy: float
    matrix: str | None
    loop: int
    arithmetic: int
    copies: dict[str, int]


def inspect(binary: Binary) -> Report:
    """Disassemble and count."""
    nvidia = "cubin" in binary.files
    instructions = _parse_sass(sass(binary)) if nvidia else _parse_amdgcn(binary.files["amdgcn"].read_text())
    registers, spilled = resources(binary)
    families = Counter(filter(None, (_matrix_family(i.opcode) for i in instructions)))
    matrix = families.most_common(1)[0][0] if families else None
    counts = _matrix_family if matrix else _is_multiply_add
    body = _hottest([bool(counts(i.opcode)) for i in instructions], natural_loops(instructions))
    loop = [instructions[i] for i in body]
    return Report(
        registers=registers,
        spilled=spilled,
        shared=binary.shared,
        occupancy=ARCHS[binary.arch].occupancy(registers, binary.shared, binary.num_warps),
        matrix=matrix,
        loop=sum(i.opcode not in ("NOP", "s_nop") for i in loop),
        arithmetic=sum(bool(counts(i.opcode)) for i in loop),
        copies=dict(sorted(Counter(filter(None, map(_copy, loop))).items())),
    )


def resources(binary: Binary) -> tuple[int, int]:
    """Registers and spilled bytes, as in :class:`Report`, without disassembling."""
    return _nvidia_resources(binary) if "cubin" in binary.files else _amd_resources(binary.files["amdgcn"])


def sass(binary: Binary) -> str:
    """Disassembly of an NVIDIA binary."""
    return _cuobjdump("-sass", binary.machine_code)


@lru_cache(maxsize=256)
def _cuobjdump(option: str, path: Path) -> str:
    return subprocess.run(
        [knobs.nvidia.cuobjdump.path, option, str(path)], check=True, capture_output=True, text=True
    ).stdout


def _nvidia_resources(binary: Binary) -> tuple[int, int]:
    usage = dict(re.findall(r"(\w+):(\d+)", _cuobjdump("-res-usage", binary.machine_code)))
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    # For compute capability 12.0, ptxas 12.9 clears 8 bytes of stack beside each copy by coordinates, never read again.
    return int(usage["REG"]), spilled if spilled and "LDL" in sass(binary) else 0


def _amd_resources(path: Path) -> tuple[int, int]:
    usage = dict(re.findall(r"\.(\w+):\s+(\d+)\n", path.read_text()))
    spilled = 4 * int(usage["vgpr_spill_count"]) + int(usage["private_segment_fixed_size"])
    return int(usage["vgpr_count"]), spilled  # vgpr_count includes the accumulators on gfx942


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def _parse_sass(text: str) -> list[Instruction]:
    lines = _SASS.findall(text)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    parsed = []
    for _, predicate, opcode, operands in lines:
        target, falls_through = None, True
        if opcode.startswith("BRA"):
            target = index[int(re.findall(r"\b0x([0-9a-f]+)", operands)[-1], 16)]
            # A uniform predicate is an operand: `BRA.U UP0, 0x210`.
            falls_through = bool(predicate) or "," in operands
        elif opcode in ("EXIT", "RET"):
            falls_through = bool(predicate)
        parsed.append(Instruction(opcode, operands, target, falls_through))
    return parsed


_AMDGCN = re.compile(r"^(?:(\.LBB\w+):|\t([a-z]+_\w+)(?:[ \t]+([^;\n]*))?)", re.MULTILINE)


def _parse_amdgcn(text: str) -> list[Instruction]:
    lines, labels = [], {}
    for label, opcode, operands in _AMDGCN.findall(text):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((opcode, operands.strip()))
    return [
        Instruction(
            opcode,
            operands,
            labels[operands] if opcode.startswith(("s_branch", "s_cbranch")) else None,
            opcode not in ("s_branch", "s_endpgm"),
        )
        for opcode, operands in lines
    ]


def natural_loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """Loops of the control-flow graph, each as the indices of its instructions.

    A loop is what reaches the tail of a back edge without passing its head; a back edge runs to
    an instruction that every way to its tail passes.
    """
    leaders = {0} | {i.target for i in instructions if i.target is not None}
    leaders |= {n + 1 for n, i in enumerate(instructions) if i.target is not None or not i.falls_through}
    starts = sorted(n for n in leaders if n < len(instructions))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
    block_at = {start: number for number, start in enumerate(starts)}
    successors = []
    for number, block in enumerate(blocks):
        last = instructions[block[-1]]
        follow = {block_at[last.target]} if last.target is not None else set()
        if last.falls_through and number + 1 < len(blocks):
            follow.add(number + 1)
        successors.append(follow)
    dominators = _dominators(successors)
    predecessors: list[set[int]] = [set() for _ in blocks]
    for number, follow in enumerate(successors):
        for successor in follow:
            predecessors[successor].add(number)
    loops: dict[int, set[int]] = {}
    for tail, follow in enumerate(successors):
        for head in follow & dominators[tail]:
            body, pending = loops.setdefault(head, {head}), [tail]
            while pending:
                block = pending.pop()
                if block not in body:
                    body.add(block)
                    pending.extend(p for p in predecessors[block] if dominators[p])
    return [frozenset(i for block in body for i in blocks[block]) for body in loops.values()]


def _dominators(successors: Sequence[set[int]]) -> list[set[int]]:
    """Blocks that every way from block 0 to a block passes; empty for a block that is not reached."""
    reached, pending = {0}, [0]
    while pending:
        for successor in successors[pending.pop()] - reached:
            reached.add(successor)
            pending.append(successor)
    dominators = [set(reached) if block in reached else set() for block in range(len(successors))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached):
            for successor in successors[block]:
                narrowed = dominators[successor] & (dominators[block] | {successor})
                if successor and narrowed != dominators[successor]:
                    dominators[successor], changed = narrowed, True
    return dominators


def _hottest(arithmetic: Sequence[bool], loops: Iterable[frozenset[int]]) -> list[int]:
    """The innermost loop with arithmetic; the one with most of it where there are several."""
    working = [loop for loop in loops if any(arithmetic[i] for i in loop)]
    innermost = [loop for loop in working if not any(other < loop for other in working)]
    return sorted(max(innermost, key=lambda loop: sum(arithmetic[i] for i in loop), default=range(len(arithmetic))))


def _matrix_family(opcode: str) -> str | None:
    if opcode.startswith("v_mfma"):
        return "MFMA"
    family = opcode.split(".")[0]
    return family if family.endswith("MMA") else None


def _is_multiply_add(opcode: str) -> bool:
    return opcode.split(".")[0] in ("FFMA", "FFMA2", "DFMA") or opcode.startswith(("v_fma", "v_pk_fma", "v_dot"))


_AMD_SIZES = {"ubyte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _copy(instruction: Instruction) -> str | None:
    opcode, *modifiers = instruction.opcode.split(".")
    if opcode == "UTMALDG":
        return "tma"
    if opcode in ("LDG", "LDGSTS"):
        kind = "async" if opcode == "LDGSTS" else "load"
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return f"{kind} {next((sizes[m] for m in modifiers if m in sizes), 4)}"
    if match := re.match(r"(?:buffer|global)_load_(\w+?)(?:_d16\w*)?$", opcode):
        kind = "async" if "lds" in instruction.operands.split() else "load"
        return f"{kind} {_AMD_SIZES.get(match[1], 2)}"
    return None
