"""Which form of a convolution and of its gradients is fastest on a CPU: the estimated times, compared.

* The *mirrored* form of the input's gradient is a forward convolution, which oneDNN has fast kernels for; at a stride,
  one for each class of positions, where the memory for another input beside its gradient is to be saved.
* The others are computed on the *volume* or on its *slices*. PyTorch gives small volumes to its own ``slow_conv3d``.
  Slices are a batch of images, for which oneDNN has 2D kernels in every case; they cost a copy of what is not
  contiguous in memory. (Depthwise layers are always computed on slices: :mod:`.depthwise`.)
* A kernel's gradient may have its operands *exchanged*: oneDNN's vectors run along the input's channels then.
* All of it may be *converted* to channels-last memory and back.
* Of few positions and many channels all is a product of matrices over *columns* (:mod:`.columns`).

``python -m benchmarks.cpu_paths`` measures what following these estimates costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import memory_format
from . import onednn
from .pieces import Piece, pieces_of

# Rates of two cores of an AMD EPYC (AVX-512), in multiply-adds or bytes a microsecond; only their ratios matter.
_ONEDNN = 80_000
_ONEDNN_GRADIENT_OF_VOLUME = 75_000
_ONEDNN_STRIDED_INPUT_GRADIENT_OF_VOLUME = 32_000
_DEPTHWISE_GRADIENT_OF_VOLUME = 3_700
_DEPTHWISE_GRADIENT_OF_SLICES = 6_800
_COPY = 2_500  # to another memory format
_COPY_OF_ROWS = 5_000  # of channels that lie together, or are few
_GATHER = 300  # of single taps of a kernel
_CONVERSION = 5_000  # of all operands to channels-last memory and back
_MATRICES = 60_000
_REORDER_OF_MATRIX = 2_600  # elements
_REORDER = 700  # of a kernel by oneDNN's 2D gradients
_LANES = 16
_STRIP = 800_000  # multiply-adds of a wide depthwise kernel's gradient in the time of another call
_PART, _HELD = 1 << 19, 1 << 22  # bytes
_FEW_POSITIONS = 512
_FEW_COLUMNS = 64
_KERNEL_OF_COLUMNS, _LARGE_KERNEL = 1 << 17, 1 << 20  # elements
_KERNEL_OF_TAPS = 1 << 19


@dataclass(frozen=True)
class Plan:
    """The forms of a layer's gradients.

    Attributes:
        depthwise: they are computed as :mod:`.depthwise` does; nothing below counts then.
        converted: all is converted to channels-last memory and back.
        by_columns: both gradients are products of matrices over columns; nothing below counts then.
        by_taps: the weight's gradient is a product of matrices for each tap.
        mirrored, sliced: for each piece, the input's gradient is mirrored; what else is asked for is on slices.
    """

    depthwise: bool
    by_columns: bool
    converted: bool
    by_taps: bool
    mirrored: tuple[bool, ...]
    sliced: tuple[bool, ...]


def plan(geometry: Geometry, grad_output: Tensor, input: Tensor, wanted: tuple[bool, bool]) -> Plan:
    """The forms that take the least time by these estimates.

    Args:
        grad_output, input: of the convolution (their shapes, dtype and memory formats count).
        wanted: whether the gradients of input and weight are asked for.
    """
    if not onednn.usable(grad_output):
        none = (False,) * len(pieces_of(geometry, grad_output.shape[1], grad_output.device.type == "cpu"))
        return Plan(False, False, False, False, none, none)
    last = tuple(memory_format(one) == torch.channels_last_3d for one in (grad_output, input))
    shape = *grad_output.shape[:2], input.shape[1]
    # PyTorch's own choices depend on the number of threads.
    exact = torch.is_anomaly_enabled()
    return _plan(geometry, *shape, grad_output.dtype, last, wanted, exact, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _plan(geometry, samples, out_channels, in_channels, dtype, last, wanted, exact: bool, threads: int) -> Plan:
    positions, size = samples * prod(geometry.output_size), samples * prod(geometry.input_size)
    by_taps = wanted[1] and _by_taps(geometry, positions, out_channels, in_channels, size)
    conversions = out_channels * positions + sum(wanted) * in_channels * size
    there_and_back = conversions * dtype.itemsize / _CONVERSION + (1 + sum(wanted)) * 2 * onednn.START
    times, mirrored, sliced = [0.0, there_and_back], [], []
    for piece in pieces_of(geometry, out_channels, True):
        cost = _PieceCost(geometry, piece, samples, in_channels // geometry.groups * piece.groups, dtype)
        forward = wanted[0] and cost.mirrored(wanted[1] and not by_taps, last[1])
        mask = wanted[0] and not forward, wanted[1] and not by_taps
        asked = any(mask) and not piece.fit.outside
        of_format = [cost.times(mask, converted) if asked else (0.0, 0.0) for converted in (False, True)]
        volume, slices = of_format[last[1]]
        mirrored.append(forward)
        sliced.append(asked and piece.slices.count > 0 and slices < volume)
        for converted in (False, True):
            times[converted] += min(of_format[converted]) + (cost.mirrored_time(converted) if forward else 0.0)
    # Mirrored kernels are reordered twice; at a stride PyTorch's own convolution takes most layers of few positions.
    kernel = out_channels * in_channels * prod(geometry.kernel_size)
    large = kernel >= (_KERNEL_OF_COLUMNS if max(geometry.stride) == 1 else _LARGE_KERNEL)
    # Columns have zeros where a position reads none, which a NaN of the output's gradient meets.
    columns = large and not exact and _few_columns(geometry, samples, dtype)
    depthwise = geometry.groups == in_channels == out_channels > 1
    convert = not depthwise and not last[0] and times[1] < times[0]
    return Plan(depthwise, columns, convert, by_taps, tuple(mirrored), tuple(sliced))


def by_columns(geometry: Geometry, input: Tensor, weight: Tensor) -> bool:
    """Whether the convolution is a product of matrices over columns: oneDNN reorders a large kernel first."""
    few = weight.numel() >= _LARGE_KERNEL and _few_columns(geometry, input.shape[0], input.dtype)
    return few and memory_format(input) == torch.channels_last_3d and onednn.usable(input)


def as_matrices(images: Tensor, weight: Tensor) -> bool:
    """Whether a 1x1 convolution of images is a product of matrices: slower, but it reorders nothing and starts at once.

    Args:
        images: ``(N, C, H, W)``; they must be rows of channels as they lie.
        weight: ``(O, C, 1, 1)``.
    """
    if images.dtype != torch.float32 or not onednn.usable(images):
        return False
    if not images.is_contiguous(memory_format=torch.channels_last):
        return False
    work = images.numel() * weight.shape[0]
    return work * (1 / _MATRICES - 1 / _ONEDNN) < onednn.START + weight.numel() / _REORDER_OF_MATRIX


def _few_columns(geometry: Geometry, samples: int, dtype: torch.dtype) -> bool:
    """Of so few positions their columns are made in no time, and a product with them takes less than reorderings."""
    few = samples * prod(geometry.output_size) <= _FEW_COLUMNS
    return few and geometry.groups == 1 and dtype == torch.float32


def _by_taps(geometry: Geometry, positions: int, out_channels: int, in_channels: int, size: int) -> bool:
    """Of few positions and many channels oneDNN's products take less time than its reorderings of the kernel.

    It also holds the kernel several times.
    """
    rows = out_channels * prod(geometry.kernel_size)
    few = positions <= _FEW_POSITIONS and rows > 4 * size
    many = rows * in_channels >= _KERNEL_OF_TAPS and min(out_channels, in_channels) >= _LANES
    return few and many and max(geometry.stride) == geometry.groups == 1


def strips_pay(products: int, channels: int, count: int) -> bool:
    """Whether a depthwise kernel's gradient takes less time in so many strips than at once.

    Args:
        products: of one channel, at all taps and positions.
    """
    return products * _filled(1, channels) > (count - 1) * _STRIP


def part(read: int, mask: tuple[bool, bool]) -> int:
    """Bytes of the input's planes whose gradients are computed at a time on slices.

    Beside the input's gradient little is to be held; the kernel's alone may hold as much as the input's will take.

    Args:
        read: bytes of all planes.
        mask: whether the gradients of input and kernel are asked for.
    """
    return max(_PART, read // (6 * sum(mask))) if mask[0] else max(read, 1)


@dataclass(frozen=True)
class _PieceCost:
    """A piece's gradients, and the microseconds of their forms."""

    geometry: Geometry
    piece: Piece
    samples: int
    in_channels: int
    dtype: torch.dtype

    @property
    def products(self) -> int:
        """Of one input channel with one output channel of their group, at all taps and positions."""
        return self.samples * prod(self.geometry.output_size) * prod(self.piece.extent)

    @property
    def kernel(self) -> int:
        """Elements of the kernel."""
        return self.piece.channels * self.in_channels // self.piece.groups * prod(self.piece.extent)

    @property
    def read(self) -> int:
        """Bytes of the input."""
        return self.in_channels * self.samples * prod(self.geometry.input_size) * self.dtype.itemsize

    def saves_memory(self, last: bool) -> bool:
        """Whether the input's gradient at a stride may not be computed on the volume, which holds it twice."""
        return last and max(self.geometry.stride) > 1 and self.read > _HELD

    def mirrored(self, of_kernel: bool, last: bool) -> bool:
        """Whether the input's gradient is computed as convolutions with the mirrored kernel.

        Args:
            of_kernel: the kernel's gradient is asked for, too.
            last: the input is in channels-last memory.
        """
        work = self.samples * prod(self.geometry.output_size) * self.kernel
        if self.piece.fit.outside or work <= onednn.WORTHWHILE * len(self.piece.mirrored):
            return False
        if max(self.geometry.stride) == 1:
            return True
        if self.piece.groups > 1 or not self.saves_memory(last):
            return False  # grouped, oneDNN has kernels on slices
        kernel_only = min(self.times((False, True), last)) if of_kernel else 0.0
        return self.mirrored_time(True) + kernel_only < min(self.times((True, of_kernel), last))

    def mirrored_time(self, last: bool) -> float:
        """Of the mirrored convolutions. Of plain memory oneDNN makes blocks of channels, and fills them up.

        Zero for grouped convolutions, which take the same time in both formats.
        """
        if self.piece.groups > 1:
            return 0.0
        summed, apart = self.piece.channels if last else _filled(1, self.piece.channels), 0.0
        if max(self.geometry.stride) > 1:  # the kernel is taken apart, and what comes is added to all positions
            apart = len(self.piece.mirrored) * onednn.START + self.kernel * self.dtype.itemsize / _GATHER
            apart += 2 * self.read / _COPY_OF_ROWS
        return self.products * _filled(summed, self.in_channels) / _ONEDNN + apart

    def _volume_exchanged(self) -> bool:
        shape = self.samples, self.piece.channels, *self.geometry.output_size
        fit = self.piece.fit
        operands = self.in_channels, self.piece.extent, fit.padding, self.piece.dilation, self.piece.groups, self.dtype
        return _exchanged(shape, *operands, torch.get_num_threads())

    def times(self, mask: tuple[bool, bool], last: bool) -> tuple[float, float]:
        """On the volume and on its slices.

        Args:
            mask: whether the gradients of input and kernel are asked for.
            last: all is in channels-last memory.
        """
        piece, stride = self.piece, self.geometry.stride
        asked, strided, groups = sum(mask), max(stride) > 1, piece.groups
        group_in, group_out = self.in_channels // groups, piece.channels // groups
        copy = self.read / (_COPY_OF_ROWS if last or self.in_channels < _LANES // 2 else _COPY)
        # The input's gradient is cleared, and its planes written.
        copies = mask[1] / (stride[piece.view] if last else 1) + 2 * mask[0]
        if last and piece.view == 0 and stride[0] == 1 and not mask[0]:
            copies = 0  # the slices lie in the volume
        if group_in == 1 and groups > 1:
            work = asked * self.products * _filled(1, piece.channels)
            volume = work / _DEPTHWISE_GRADIENT_OF_VOLUME + (1 + 2 * mask[0]) * copy
            return volume, work / _DEPTHWISE_GRADIENT_OF_SLICES + copies * copy
        # Vectors run along the channels; those of another group cannot fill them up.
        work = self.products * groups * _filled(group_in, group_out)
        fewest = work if strided or mask[0] else self.products * groups * _fewest_filled(group_in, group_out)
        # The kernel and its gradient are reordered too, which outweighs the rest where they are large.
        reorder = self.kernel * self.dtype.itemsize / _REORDER
        parts = -(-self.read // part(self.read, mask)) if copies and asked else 1
        slices = asked * (fewest / _ONEDNN + parts * reorder) + copies * copy + parts * onednn.START
        inputs = self.samples, self.in_channels, *piece.fit.size(self.geometry.input_size)
        operands = piece.fit.padding, piece.dilation, groups, self.dtype
        if not _takes_onednn(inputs, piece.channels, piece.extent, stride, *operands):
            volume = asked * self.products * groups * group_in * group_out / onednn.SLOW_CONV3D
            volume += (2 * mask[0] + last) * copy
        elif mask[0]:
            rate = _ONEDNN_STRIDED_INPUT_GRADIENT_OF_VOLUME if strided else _ONEDNN_GRADIENT_OF_VOLUME
            volume = work / rate + mask[1] * work / _ONEDNN_GRADIENT_OF_VOLUME + (0 if last else 2 * copy)
            volume = float("inf") if self.saves_memory(last) else volume
        elif last and not strided and self._volume_exchanged():
            volume = fewest / _ONEDNN_GRADIENT_OF_VOLUME
        else:
            volume = work / _ONEDNN_GRADIENT_OF_VOLUME
        return volume + 2 * mask[0] * self.read / _COPY_OF_ROWS, slices  # parts are added up


def exchanged(grad: Tensor, input: Tensor, kernel: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a kernel's gradient is computed with input and output's gradient in each other's place.

    ``sum_p g[p, o] x[p + t, c]`` is then the gradient of the mirrored kernel, whose output has the
    input's channels: oneDNN's vectors run along these, of which fewer may be left over. In other memory than
    channels-last it reorders both, and nothing is gained.
    """
    if max(stride) > 1 or grad.stride(1) != 1 or input.stride(1) != 1 or not onednn.usable(grad):
        return False
    operands = tuple(grad.shape), input.shape[1], tuple(kernel.shape[2:]), tuple(padding), tuple(dilation), groups
    return _exchanged(*operands, grad.dtype, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _exchanged(grad_shape, in_channels, extent, padding, dilation, groups, dtype, threads) -> bool:
    channels = in_channels // groups, grad_shape[1] // groups
    if _fewest_filled(*channels) == _filled(*channels):
        return False
    padding = exchanged_padding(extent, padding, dilation)
    reach = [(k - 1) * d + 1 for k, d in zip(extent, dilation, strict=True)]
    # oneDNN's weight gradient may not pad an axis that the kernel spans, see `pieces_of`.
    if any(pad < 0 or (pad and n <= k) for pad, n, k in zip(padding, grad_shape[2:], reach, strict=True)):
        return False
    return _takes_onednn(grad_shape, in_channels, extent, (1,) * len(extent), padding, dilation, groups, dtype)


def exchanged_padding(extent, padding, dilation) -> tuple[int, ...]:
    """The padding of the mirrored convolution at stride 1."""
    return tuple((k - 1) * d - pad for k, d, pad in zip(extent, dilation, padding, strict=True))


def _filled(others: int, along: int) -> int:
    """Products of two runs of channels at a position, where vectors run along the second and are filled up."""
    return others * -(-along // _LANES) * _LANES


def _fewest_filled(in_channels: int, out_channels: int) -> int:
    """:func:`_filled` of a kernel's gradient at stride 1, whose vectors may run along both."""
    return min(_filled(in_channels, out_channels), _filled(out_channels, in_channels))


def _takes_onednn(shape, out_channels: int, extent, stride, padding, dilation, groups: int, dtype) -> bool:
    """Whether PyTorch's own choice for a convolution of a tensor of this shape is oneDNN."""
    input = torch.empty(shape, dtype=dtype)
    kernel = torch.empty((out_channels, shape[1] // groups, *extent), dtype=dtype)
    zeros = (0,) * len(extent)
    backend = torch._C._select_conv_backend(input, kernel, None, stride, padding, dilation, False, zeros, groups)
    return backend == torch._C._ConvBackend.Mkldnn
