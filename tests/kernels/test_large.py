"""Samples of more than 2**31 elements: every kernel family addresses their far end.

The large tensor is memory that the operating system lends page by page, and only what a kernel
touches becomes real. Large strides (or, for the input gradient, large padding) leave few outputs to
compute, so that few programs run.
"""

import mmap

import pytest
import torch

from acs_triton.backends import triton as triton_backend
from acs_triton.geometry import ConvParams, default_split
from acs_triton.kernels import depthwise, gather_gemm, stem, weight_grad
from acs_triton.kernels.channels_last import is_channels_last

from . import oracle

DTYPE = torch.float16
FAR = 4096  # distance of two outputs, or padding


@pytest.fixture(autouse=True)
def interpreted(device):
    if not device.interpreted:
        pytest.skip("the memory is the CPU's; on a GPU see test_sample_beyond_32_bits")


def lent(shape):
    """Zeros in channels-last order, without memory until they are touched."""
    n, c, *size = shape
    elements = torch.Size(shape).numel()
    assert elements // n > 2**31
    memory = mmap.mmap(-1, elements * DTYPE.itemsize)
    return torch.frombuffer(memory, dtype=DTYPE).view(n, *size, c).permute(0, 4, 1, 2, 3)


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def geometry_of(size, out_channels, groups, stride=1, padding=(0, 0, 0)):
    roles = padding[0], padding[1], padding[1], padding[2]
    three = 1, stride, stride
    return ConvParams((3, 3), three, roles, roles, (1,) * 4, groups, default_split(out_channels), "aligned").geometry(
        size
    )


@pytest.mark.parametrize(
    ("family", "channels", "out_channels", "groups"),
    [("gather_gemm", 16, 24, 1), ("depthwise", 16, 16, 16), ("stem", 4, 12, 1)],
)
def test_read_far_ahead(family, channels, out_channels, groups):
    """Forward and weight gradient read an input of ``(3, side, side)`` voxels at its four corners."""
    side = {16: 2 * FAR + 3, 4: 4 * FAR + 3}[channels]
    geometry = geometry_of((3, side, side), out_channels, groups, stride=side - 3)
    assert geometry.output_size == (1, 2, 2)
    x = lent((1, channels, 3, side, side))
    small, edge = values(1, channels, 3, 6, 6), torch.tensor([0, 1, 2, -3, -2, -1])
    x[:, :, :, edge[:, None], edge] = small
    weight, grad = values(out_channels, channels // groups, 3, 3, seed=1), values(1, out_channels, 1, 2, 2, seed=2)
    near = geometry_of((3, 6, 6), out_channels, groups, stride=3)
    kernels = {"gather_gemm": gather_gemm, "depthwise": depthwise, "stem": stem}[family]
    of_weight = weight_grad if family == "gather_gemm" else kernels
    terms = 9 * channels // groups
    oracle.check(
        kernels.conv(x, weight, None, geometry),
        oracle.conv(small, weight, None, near),
        oracle.conv(small.abs(), weight.abs(), None, near),
        terms,
    )
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    oracle.check(
        of_weight.weight_grad(grad, x, geometry),
        oracle.weight_grad(grad, small, near),
        oracle.weight_grad(grad.abs(), small.abs(), near),
        terms,
    )


@pytest.mark.parametrize(("family", "groups"), [(gather_gemm, 1), (depthwise, 16)])
def test_a_gradient_read_far_ahead(family, groups):
    """The input gradient of a padded column of three voxels: it reads the middle of a plane, and the last plane."""
    far, close = (geometry_of((3, 1, 1), 16, groups, padding=(1, pad, pad)) for pad in (FAR, 3))
    grad = lent((1, 16, *far.output_size))
    small = values(1, 16, *close.output_size)
    middle = slice(FAR - 3, FAR + 2)
    grad[:, :, :, middle, middle] = small
    weight = values(16, 16 // groups, 3, 3, seed=1)
    oracle.check(
        family.input_grad(grad, weight, far),
        oracle.input_grad(small, weight, close),
        oracle.input_grad(small.abs(), weight.abs(), close),
        9 * 16 // groups,
    )


def test_slices_that_span_too_much_are_copied():
    """Offsets count vectors of 16 bytes in 32 bits."""
    whole = torch.empty((2, 512, 256, 256, 512), dtype=DTYPE, device="meta", memory_format=torch.channels_last_3d)
    assert is_channels_last(whole), "larger than its parts are: the batch is computed in parts"
    assert is_channels_last(whole[:1, :8])
    assert not is_channels_last(whole[:, :8])
    assert not is_channels_last(whole[:, :8, :64])


def test_strides_that_spread_a_tile_too_far_go_to_the_torch_backend():
    weight, size = torch.zeros(1).expand(16, 4096, 3, 3), (4, 64, 64)
    for stride, reason in (((1, 2, 2), None), ((1, 32, 32), "spreads 4096 channels beyond")):
        params = ConvParams((3, 3), stride, (1,) * 4, (1,) * 4, (1,) * 4, 1, default_split(16))
        grad = torch.zeros(1).expand(1, 16, *params.geometry(size).output_size)
        found = triton_backend.why_not("input_grad", grad, weight, params.geometry(size))
        assert found is reason or reason in found
