"""Compiling without a GPU, and reading what came out: driver, disassembly, occupancy."""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from acs_triton import backends, explain, use_backend
from acs_triton.arguments import conv_params
from acs_triton.functional import acs_conv3d
from acs_triton.kernels import device
from benchmarks import disassembly
from benchmarks.disassembly import _hottest, _parse_amdgcn, _parse_sass, inspect, natural_loops
from benchmarks.offline import ARCHS, offline

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the compiler")


@triton.jit
def matmul_kernel(p_a, p_b, p_c, n_steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for step in range(n_steps):
        a = tl.load(p_a + step * M * K + o_m[:, None] * K + o_k[None, :])
        b = tl.load(p_b + step * N * K + o_n[:, None] * K + o_k[None, :])
        acc = tl.dot(a, b.T, acc)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], acc)


@triton.jit
def scale_kernel(p_x, p_y, n, SIZE: tl.constexpr):
    o_x = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(p_y + o_x, 2 * tl.load(p_x + o_x, mask=o_x < n), mask=o_x < n)


def matmul(tile=(128, 64, 64), grid=(1,), dtype=torch.float16, **options):
    operand, result = torch.empty(64, dtype=dtype, device="meta"), torch.empty(64, device="meta")
    matmul_kernel[grid](operand, operand, result, 9, *tile, **options)


def scale(n=1000, offset=0):
    x = torch.empty(n + offset, device="meta")[offset:]
    scale_kernel[(4,)](x, torch.empty(n, device="meta"), n, 256)


@pytest.mark.parametrize(
    ("arch", "matrix", "copy"),
    [
        ("sm_80", "HMMA", "async 16"),
        ("sm_90", "HGMMA", "async 16"),
        ("sm_100", "UTCHMMA", "async 16"),
        ("sm_120", "HMMA", "async 16"),
        ("gfx942", "MFMA", "load 16"),
    ],
)
def test_figures_of_a_matrix_product(arch, matrix, copy):
    with offline(arch) as gpu:
        matmul()
    (binary,) = gpu.binaries
    report = inspect(binary)
    assert (report.matrix, report.spilled) == (matrix, 0)
    assert report.copies[copy] == (128 * 64 + 64 * 64) * 2 // (16 * 4 * gpu.arch.target.warp_size)
    flops = {"HMMA": 16 * 8 * 16, "HGMMA": 64 * 64 * 16, "UTCHMMA": 128 * 64 * 16, "MFMA": 32 * 32 * 8}
    # Warps share the tile; only tcgen05 is issued once for all of them.
    issuers = 1 if matrix in ("HGMMA", "UTCHMMA") else 4
    assert report.arithmetic == 128 * 64 * 64 // flops[matrix] // issuers
    assert report.arithmetic < report.loop < 300
    assert 32 <= report.registers <= 255
    assert binary.shared == report.shared > 0


def test_spills_are_seen():
    with offline("sm_80") as gpu:
        matmul((256, 256, 32))
    assert inspect(gpu.binaries[0]).spilled > 0


@pytest.mark.parametrize(("code", "spilled"), [("STL.64 [R1], RZ ;", 0), ("STL [R1], R5 ; LDL R6, [R1] ;", 8)])
def test_a_stack_that_nothing_is_read_from_is_no_spill(code, spilled, monkeypatch):
    answers = {"-res-usage": "REG:160 STACK:8 SHARED:0 LOCAL:0", "-sass": code}
    monkeypatch.setattr(disassembly, "_cuobjdump", lambda option, path: answers[option])
    assert disassembly.resources(SimpleNamespace(files={"cubin": None}, machine_code=None)) == (160, spilled)


def test_kernels_without_a_loop_are_counted_whole():
    with offline("sm_90") as gpu:
        scale()
    report = inspect(gpu.binaries[0])
    assert (report.matrix, report.arithmetic) == (None, 0)
    assert sum(report.copies.values()) > 0


def test_every_launch_and_every_distinct_binary_is_recorded():
    with offline("sm_90") as gpu:
        scale()
        scale()
        scale(n=992)  # divisible by 16: specialised anew
        scale(offset=1)  # not aligned
    assert len(gpu.launches) == 4
    assert [digest for digest, _ in gpu.launches[:2]] == [gpu.binaries[0].digest] * 2
    assert len({binary.digest for binary in gpu.binaries}) == len(gpu.binaries) == 3
    assert {binary.kernel for binary in gpu.binaries} == {"scale_kernel"}
    assert gpu.binaries[0].constants == {"SIZE": 256}
    assert gpu.binaries[0].signature["p_x"] == "*fp32"


def test_targets_do_not_share_binaries():
    for arch in ("sm_80", "sm_90", "sm_80"):
        with offline(arch) as gpu:
            scale()
        assert [binary.arch for binary in gpu.binaries] == [arch]


def test_too_much_shared_memory_is_an_error():
    with offline("sm_86"), pytest.raises(OutOfResources, match="shared memory"):
        matmul((128, 128, 128), num_stages=4)
    with offline("sm_90"):
        matmul((128, 128, 128), num_stages=3, num_warps=8)


@pytest.mark.parametrize("grid", [(0,), (1, 65536), (1, 1, 65536)])
def test_grids_beyond_the_limits_are_errors(grid):
    with offline("sm_80"), pytest.raises(ValueError, match="outside CUDA's limits"):
        matmul(grid=grid)


def test_the_driver_before_is_restored():
    before = driver._active
    with pytest.raises(ZeroDivisionError), offline("sm_80"):
        raise ZeroDivisionError
    assert driver._active is before
    assert triton.knobs.compilation.listener is None


def test_an_unknown_arch_is_named():
    with pytest.raises(ValueError, match=r"arch='sm_70' is not known; use one of sm_80"), offline("sm_70"):
        pass


def test_nothing_can_be_timed():
    with offline("sm_80"), pytest.raises(RuntimeError, match="nothing to time"):
        driver.active.get_benchmarker()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (GPUTarget("cuda", 75, 32), "the kernels need compute capability 8.0 or newer, this GPU has 7.5"),
        (GPUTarget("hip", "gfx1100", 32), "the kernels support AMD's gfx90a, gfx942, gfx950, this GPU is gfx1100"),
    ],
    ids=lambda value: str(value.arch) if isinstance(value, GPUTarget) else "",
)
def test_a_gpu_that_the_kernels_do_not_support_is_one_sentence(target, reason, monkeypatch):
    monkeypatch.setitem(ARCHS, "other", replace(ARCHS["sm_80"], target=target))
    x, weight = torch.empty(1, 8, 4, 4, 4, device="meta"), torch.empty(6, 8, 3, 3, device="meta")
    with offline("other") as gpu:
        with use_backend("auto"):
            assert f"torch: {reason}" in explain(x, weight)
            assert acs_conv3d(x, weight).shape == (1, 6, 2, 2, 2)
        with use_backend("triton"), pytest.raises(RuntimeError, match=f"set to 'triton', but {reason}"):
            # Tensors on meta never get as far as a backend: registered operators have shapes for them.
            backends.choose("conv", x, weight, conv_params((3, 3), 6, 1, 0, 1, 1, None).geometry((4, 4, 4)))
    assert not gpu.launches


def test_a_driver_that_cannot_be_built_is_one_sentence_and_is_tried_once(monkeypatch):
    """As where the C compiler finds no headers: Triton's error is no RuntimeError."""
    tries = []

    class Driver:
        _active = None

        @property
        def active(self):
            tries.append(1)
            raise subprocess.CalledProcessError(1, ["gcc", "driver.c"])

    monkeypatch.setattr(triton.runtime, "driver", Driver())
    monkeypatch.setattr(device, "_no_driver", [])
    x, weight = torch.zeros(1, 8, 4, 4, 4, device="meta"), torch.zeros(6, 8, 3, 3, device="meta")
    with use_backend("auto"):
        for _ in range(2):
            assert "torch: Triton has no active driver on this machine: Command '['gcc'" in explain(x, weight)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 1.0),
        ("sm_80", 128, 0, 4, 0.25),
        ("sm_80", 168, 49152, 4, 0.1875),  # 3 blocks by registers and by shared memory
        ("sm_80", 255, 0, 8, 0.125),
        ("sm_86", 64, 0, 4, 32 / 48),
        ("sm_90", 32, 227 * 1024, 4, 4 / 64),
        ("sm_90", 16, 0, 1, 0.5),  # 32 block slots
        ("gfx942", 128, 32768, 4, 0.25),
        ("gfx942", 512, 0, 4, 0.125),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert ARCHS[arch].occupancy(registers, shared, warps) == pytest.approx(expected)


# A loop with a wait that spins, one block of it moved behind the end, and a tail loop.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                       /* 0x00000a00ff017624 */
                                                                                /* 0x000fe400078e00ff */
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;    /* 0x0 */
        /*0020*/              @!P0 BRA 0x80 ;                                   /* 0x0 */
        /*0030*/                   SYNCS.PHASECHK P1, [R2] ;                    /* 0x0 */
        /*0040*/              @!P1 BRA 0x30 ;                                   /* 0x0 */
        /*0050*/                   BRA.U UP0, 0x10 ;                            /* 0x0 */
        /*0060*/               @P2 BRA 0x60 ;                                   /* 0x0 */
        /*0070*/                   EXIT ;                                       /* 0x0 */
        /*0080*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR20][R8.64] ;/* 0x0 */
        /*0090*/                   BRA 0x30 ;                                   /* 0x0 */
        /*00a0*/                   NOP ;                                        /* 0x0 */
"""


def test_loops_are_found_as_they_execute():
    instructions = _parse_sass(SASS)
    assert [i.opcode.split(".")[0] for i in instructions][:3] == ["MOV", "HGMMA", "BRA"]
    loops = natural_loops(instructions)
    assert sorted(map(sorted, loops)) == [[1, 2, 3, 4, 5, 8, 9], [3, 4], [6]]
    arithmetic = [i.opcode.startswith("HGMMA") for i in instructions]
    assert _hottest(arithmetic, loops) == [1, 2, 3, 4, 5, 8, 9]


AMDGCN = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[10:13], v6, s[28:31], 0 offen
\tv_mfma_f32_32x32x8_f16 v[2:17], v[72:73], v[78:79], v[2:17] ; a comment
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\ts_endpgm
\t.section\t.rodata,"a",@progbits
"""


def test_loops_of_amd_assembly():
    instructions = _parse_amdgcn(AMDGCN)
    assert [i.opcode for i in instructions][-1] == "s_endpgm"
    assert natural_loops(instructions) == [frozenset({1, 2, 3})]
