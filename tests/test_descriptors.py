"""Which calls the descriptor kernels take, by shape, alignment and device: decided without a GPU."""

# ruff: noqa: E402 - what needs Triton is imported once it is known to be there
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

import acs_triton
from acs_triton.backends import triton as backend
from benchmarks.offline import offline
from benchmarks.workloads import PRIMITIVES, Layer

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET replaces the compiler")

WIDE = Layer(64, 192)
DESCRIPTORS = ["descriptor_gemm", "descriptor_gemm", "descriptor_weight_grad"]
POINTERS = ["gather_gemm", "gather_gemm", "weight_grad"]


def plans(layer: Layer, dtype=torch.float16, change=lambda tensor: tensor) -> list[backend.Plan]:
    """Of the three primitives; ``change`` makes the data tensors that are asked about from those of the layer."""
    geometry = layer.geometry
    layout = torch.channels_last_3d if layer.channels_last else torch.contiguous_format
    to = {"dtype": dtype, "device": "meta"}
    x = torch.empty((layer.batch, layer.in_channels, *layer.size), **to, memory_format=layout)
    g = torch.empty((layer.batch, layer.out_channels, *geometry.output_size), **to, memory_format=layout)
    w = torch.empty((layer.out_channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel), **to)
    x, g = change(x), change(g)
    pairs = ((x, w), (g, w), (g, x))
    return [backend.plan(primitive, *pair, geometry) for primitive, pair in zip(PRIMITIVES, pairs, strict=True)]


def kernels(*arguments, **named) -> list[str]:
    return [plan.kernel for plan in plans(*arguments, **named)]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm_80", POINTERS), ("sm_89", POINTERS), ("sm_90", DESCRIPTORS), ("sm_100", DESCRIPTORS), ("gfx942", POINTERS)],
)
def test_devices(arch, expected):
    with offline(arch):
        assert kernels(WIDE) == expected


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (replace(WIDE, size=(3, 3, 3)), DESCRIPTORS),  # mostly waste, but few
        (replace(WIDE, size=(33, 33, 33)), DESCRIPTORS),  # channels decide, not volumes
        (replace(WIDE, size=(1, 64, 64)), [*POINTERS[:2], DESCRIPTORS[2]]),  # but for those that boxes cover badly
        (replace(WIDE, size=(16, 2048, 2048)), [*POINTERS[:2], DESCRIPTORS[2]]),  # too far apart for 32-bit offsets
        (replace(WIDE, stride=2, size=(64, 64, 64)), DESCRIPTORS),
        (replace(WIDE, stride=2, size=(64, 63, 64)), ["gather_gemm", "descriptor_gemm", "weight_grad"]),  # not halves
        (replace(WIDE, stride=3, size=(63, 63, 63)), ["gather_gemm", "descriptor_gemm", "weight_grad"]),
        (replace(WIDE, groups=2), ["descriptor_gemm", "gather_gemm", "weight_grad"]),
        (replace(WIDE, in_channels=48, groups=2), POINTERS),  # a block of channels would reach into the next group
        (Layer(64, 64), ["descriptor_gemm", "descriptor_gemm", "weight_grad"]),
        (Layer(96, 96, groups=96), ["depthwise"] * 3),
    ],
    ids=lambda value: str(value.size) if isinstance(value, Layer) else "",
)
def test_shapes(layer, expected):
    with offline("sm_90"):
        assert kernels(layer) == expected


def test_dtypes():
    precision = torch.backends.cudnn.conv.fp32_precision
    try:
        with offline("sm_90"):
            assert kernels(WIDE, torch.bfloat16) == DESCRIPTORS
            torch.backends.cudnn.conv.fp32_precision = "tf32"
            assert kernels(WIDE, torch.float32) == [*DESCRIPTORS[:2], "weight_grad"]
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            assert kernels(WIDE, torch.float32) == POINTERS
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision


def test_alignment():
    """What is not in the kernels' memory format is copied into it; strides of zero go to the pointer kernels."""
    with offline("sm_90"):
        assert [plan.copies for plan in plans(WIDE)] == [(), (), ()]
        copied = [("input",), ("grad_output",), ("grad_output", "input")]
        for change in (torch.Tensor.contiguous, lambda tensor: tensor.new_empty((*tensor.shape[:4], 33))[..., 1:]):
            found = plans(WIDE, change=change)
            assert [plan.kernel for plan in found] == DESCRIPTORS
            assert [plan.copies for plan in found] == copied
        assert kernels(WIDE, change=lambda tensor: tensor[:1].expand(2, -1, -1, -1, -1)) == POINTERS
        assert kernels(WIDE, change=lambda tensor: tensor[:0]) == POINTERS


def test_merged_taps_where_views_fill_a_tile_badly():
    with offline("sm_90"):
        assert plans(Layer(64, 64))[0].tile.merged
        assert not plans(Layer(128, 128))[0].tile.merged


def test_explain_shows_it():
    with offline("sm_90"), acs_triton.use_backend("triton"):
        x = torch.empty((2, 64, 32, 32, 32), dtype=torch.float16, device="meta", memory_format=torch.channels_last_3d)
        text = str(acs_triton.explain(x, x.new_empty((192, 64, 3, 3)), padding=1))
    assert "descriptor_gemm, Tile(bo=64" in text
    assert "descriptor_weight_grad, Tile(bc=64" in text
