"""Tensors of any strides as the rows that the matrix kernels read: the same bits, and zeros between the groups."""

import mmap

import pytest
import torch
import torch.nn.functional as F

from acs_triton.kernels.channels_last import channels_last, is_channels_last, unit
from acs_triton.kernels.layout_conversion import convert

LAST = torch.channels_last_3d


def check(x: torch.Tensor, groups: int = 1):
    rows = convert(x, groups)
    padding = -(x.shape[1] // groups) % unit(x.dtype)
    expected = F.pad(x.unflatten(1, (groups, -1)), (0, 0) * 3 + (0, padding)).flatten(1, 2)
    assert rows.dtype == x.dtype
    assert torch.equal(rows, expected)
    assert is_channels_last(rows, groups)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 70, 5, 6, 7), 1),  # tiles that both axes fill in part
        ((1, 24, 8, 4, 8), 1),  # whole vectors of positions
        ((2, 34, 3, 1, 5), 2),
        ((3, 12, 2, 3, 4), 4),
        ((1, 1, 9, 8, 8), 1),
        ((1, 5, 1, 1, 1), 1),
    ],
)
@pytest.mark.parametrize("format", [torch.contiguous_format, LAST], ids=["ncdhw", "channels_last"])
def test_shapes(shape, groups, format, make, dtype):
    check(make(shape, dtype, format=format), groups)


CUTS = {
    "channels": lambda x: x[:, 3:17],
    "positions": lambda x: x[:, :, 1:, :, 2:7],
    "every other": lambda x: x[:, :, ::2, :, ::2],
    "turned": lambda x: x.transpose(2, 4),
    "batch": lambda x: x[1:],
    "every other of the batch": lambda x: x[::2],
    "expanded channels": lambda x: x[:, :1].expand(-1, 9, -1, -1, -1),
    "expanded positions": lambda x: x[..., :1].expand(-1, -1, -1, -1, 6),
    "expanded": lambda x: x[:1, :1, :1, :1, :1].expand(2, 9, 3, 4, 5),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("format", [torch.contiguous_format, LAST], ids=["ncdhw", "channels_last"])
def test_parts_of_a_tensor(cut, format, make, main_dtype):
    check(CUTS[cut](make((3, 20, 4, 3, 8), main_dtype, format=format)))


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("format", [torch.contiguous_format, LAST], ids=["ncdhw", "channels_last"])
def test_addresses_between_vectors(offset, format, make, main_dtype):
    check(make((2, 12, 3, 4, 6), main_dtype, format=format, offset=offset))


def test_infinite_and_missing_values_are_copied(make, main_dtype):
    x = make((1, 7, 3, 4, 5), main_dtype)
    x[0, 3, 1], x[0, 6, 2, 2], x[0, 0, 0, 0, 0] = float("inf"), -float("inf"), float("nan")
    rows = convert(x)
    assert torch.equal(rows[:, :7].nan_to_num(nan=9.0), x.nan_to_num(nan=9.0))
    assert not rows[:, 7:].any()


def test_an_empty_batch(make, main_dtype):
    assert convert(make((0, 8, 2, 3, 4), main_dtype)).shape == (0, 8, 2, 3, 4)


def test_what_lies_right_is_not_copied(make, main_dtype):
    x = make((2, 16, 3, 4, 5), main_dtype, format=LAST)
    assert channels_last(x) is x
    assert channels_last(x[:, :8, 1:]).data_ptr() == x[:, :8, 1:].data_ptr()
    assert channels_last(x, groups=16).shape[1] == 16 * unit(main_dtype)


@pytest.mark.parametrize("axis", range(5))
def test_samples_beyond_32_bits(axis, device):
    """A stride of 2**30 along each axis in its turn: the third index along it is beyond 2**31 elements."""
    if not device.interpreted:
        pytest.skip("the interpreter shares its memory with the host")
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 2**16)), dtype=torch.float16)  # what is touched becomes real
    for run in {1, 4} - {axis}:
        strides = [0] * 5
        for power, other in enumerate([run, *(other for other in range(5) if other not in (axis, run))]):
            strides[other] = 3**power
        strides[axis] = 2**30
        x = memory.as_strided((3,) * 5, strides)
        check(x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0))))
