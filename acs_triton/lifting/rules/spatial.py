"""Operations on the plane of an image: convolutions, pooling, padding, resampling. They become 3D here."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ... import functional as acs
from ...activations import activate
from ...geometry import default_split
from ...standard import conv3d, spanned_axes
from ..errors import LiftingError
from ..rows import known_equal, rows_of
from ..separable import avg_pool3d, resize_nearest
from ..weights import inflate
from .table import mark, replaces


def pair(value) -> tuple:
    """``(h, w)`` of an argument given as one value, one in a sequence, or two."""
    if isinstance(value, (tuple, list, torch.Size)):
        return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])
    return (value, value)


def is_image(tensor) -> bool:
    """Whether a 4-D tensor is a batch of slices with their plane last. Windows and other planes stay in a slice."""
    rows = rows_of(tensor)
    if rows.axis != 0 or tensor.dim() != 4:
        raise LiftingError("its input must be a batch of slices (N * D, C, H, W)")
    return rows.inner == 1 and "c" not in rows.axes[2:] and rows.axes[1] != "p"


def same_plane(run, tensor, result):
    """Mark the result of an operation that ran on each slice."""
    return run.noted(rows_of(tensor).replace(axes="rcpp").put_on(result))


def along_depth(kernel, *others):
    """Kernel size, and other arguments with it, of the depth axis: those of the axis with the smaller kernel."""
    axis = 0 if kernel[0] <= kernel[1] else 1
    return (kernel[axis], *(values[axis] for values in others))


# ---- convolutions


@replaces("conv2d", "convolution in 3D")
def conv2d(run, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if rows_of(weight) is not None or rows_of(input) is None:
        raise LiftingError("its kernel depends on the volume")
    activation = getattr(run.layer, "_acs_activation", None)
    stride, dilation = pair(stride), pair(dilation)
    padding = padding if isinstance(padding, str) else pair(padding)
    if not is_image(input):
        flat = weight.sum(2) if weight.dim() == 5 else weight
        if _is_pointwise(flat, stride, padding):
            output = acs.pointwise(input, flat, bias, groups)
        else:
            output = F.conv2d(input, flat, bias, stride, padding, dilation, groups)
        return same_plane(run, input, activate(output, activation))
    lift = run.lift
    if weight.dim() == 5 and lift.kind != "3d":
        weight = weight.sum(lift.axis)
    steps = (lift.depth_stride or min(stride), *stride)
    if _is_pointwise(weight, steps, padding) and lift.kind != "soft":
        return same_plane(run, input, activate(acs.pointwise(input, weight, bias, groups), activation))
    volume = run.volume(input)
    options = steps, padding, dilation, groups
    if lift.kind == "acs":
        output = acs.acs_conv3d(volume, weight, bias, *options, lift.split, lift.aligned, activation)
    elif lift.kind == "2.5d":
        output = acs.conv2_5d(volume, weight, bias, *options, activation=activation)
    elif lift.kind == "3d":
        output = activate(_dense_conv(volume, weight, bias, *options, lift), activation)
    else:
        output = acs.soft_acs_conv3d(volume, weight, run.view_weight(weight), bias, *options, lift.aligned, activation)
    return run.like(input, output)


def _is_pointwise(weight, steps, padding) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and steps in ((1, 1), (1, 1, 1)) and padding in ((0, 0), "same")


def _dense_conv(volume, weight, bias, stride, padding, dilation, groups, lift):
    if weight.dim() == 4:
        weight = inflate(weight, lift)
    kernel = tuple(weight.shape[-2:])
    dilation = (along_depth(kernel, dilation)[1], *dilation)
    if isinstance(padding, str):
        totals = [(k - 1) * d if padding == "same" else 0 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        pads = [n // 2 for n in totals], [n - n // 2 for n in totals]
    else:
        pads = ((along_depth(kernel, padding)[1], *padding),) * 2
    return conv3d(volume, weight, bias, stride, pads, dilation, groups)


@replaces("conv_transpose2d", "transposed convolution in 3D")
def conv_transpose2d(run, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    if rows_of(weight) is not None or rows_of(input) is None:
        raise LiftingError("its kernel depends on the volume")
    if not is_image(input):
        raise LiftingError("its input must be a batch of slices (N * D, C, H, W)")
    stride, padding, output_padding, dilation = pair(stride), pair(padding), pair(output_padding), pair(dilation)
    lift = run.lift
    if weight.dim() == 5 and lift.kind != "3d":
        weight = weight.sum(lift.axis) / min(stride)
    volume = run.volume(input)
    _, *through = along_depth(tuple(weight.shape[-2:]), stride, padding, output_padding, dilation)
    options = (stride, padding, output_padding, groups, dilation)
    if lift.kind == "3d":
        if weight.dim() == 4:
            weight = inflate(weight, lift, min(stride))
        three = [
            (extra, *values) for extra, values in zip(through, (stride, padding, output_padding, dilation), strict=True)
        ]
        output = _conv_transpose3d(volume, weight, bias, three[0], three[1], three[2], groups, three[3])
        return _to_seen_depth(run, input, output)
    if lift.kind == "2.5d":
        output = _transposed_view(volume, weight, 0, *options)
    else:
        channels = weight.shape[1] * groups
        if lift.kind == "acs":
            parts, first = [], 0
            for view, count in enumerate(lift.split or default_split(channels)):
                if count:
                    parts.append(_transposed_channels(volume, weight, view, first, first + count, *options))
                first += count
            output = torch.cat(parts, 1)
        else:
            shares = run.view_weight(weight, channels).unbind(1)
            views = [_transposed_view(volume, weight, view, *options) for view in range(3)]
            output = sum(share.view(1, -1, 1, 1, 1) * view for share, view in zip(shares, views, strict=True))
    if bias is not None:
        output = output + bias.view(1, -1, 1, 1, 1)
    return _to_seen_depth(run, input, output)


def _to_seen_depth(run, input, volume):
    """Slices of an upsampled volume, with the depth that its plane had on the way down."""
    depth = volume.shape[2]
    if run.lift.depth_stride is not None and not rows_of(input).pooled:
        depth = rows_of(input).depth * run.lift.depth_stride
    wanted = run.depth_of_plane(volume.shape[3], volume.shape[4], depth)
    return run.like(input, _nearest(volume, 2, wanted))


def _transposed_channels(volume, weight, view, first, end, stride, padding, output_padding, groups, dilation):
    """Output channels ``first`` to ``end`` of one view."""
    each = weight.shape[1]
    low, high = first // each, -(-end // each)
    inputs = weight.shape[0] // groups
    part = volume[:, low * inputs : high * inputs]
    kernel = weight[low * inputs : high * inputs]
    first, end = first - low * each, end - low * each
    if high - low == 1:
        kernel, first, end = kernel[:, first:end], 0, end - first
    result = _transposed_view(part, kernel, view, stride, padding, output_padding, high - low, dilation)
    return result[:, first:end]


def _transposed_view(volume, weight, view, stride, padding, output_padding, groups, dilation):
    """A transposed convolution in the planes of one view; the through-plane axis is repeated to the same scale.

    ACS has no published transposed form. Equal slices must stay equal, so a kernel of size 1
    with gaps between its outputs is out; nearest-neighbour is the plain choice.
    """
    axes = [axis for axis in range(3) if axis != view]

    def triple(values, through):
        out = [through] * 3
        for axis, value in zip(axes, values, strict=True):
            out[axis] = value
        return tuple(out)

    output = _conv_transpose3d(
        volume,
        weight.unsqueeze(2 + view),
        None,
        triple(stride, 1),
        triple(padding, 0),
        triple(output_padding, 0),
        groups,
        triple(dilation, 1),
    )
    s, p, extra, d = along_depth(tuple(weight.shape[-2:]), stride, padding, output_padding, dilation)[1:]
    size = volume.shape[2 + view]
    length = (size - 1) * s - 2 * p + d * (min(weight.shape[-2:]) - 1) + extra + 1
    return _nearest(output, 2 + view, length)


def _conv_transpose3d(volume, weight, bias, stride, padding, output_padding, groups, dilation):
    """``torch.nn.functional.conv_transpose3d``; where its weight gradient is not to be trusted, cropped by hand."""
    kernel = tuple(weight.shape[2:])
    sizes = [
        (n - 1) * s - 2 * p + (k - 1) * d + extra + 1
        for n, s, p, k, d, extra in zip(
            volume.shape[2:], stride, padding, kernel, dilation, output_padding, strict=True
        )
    ]
    spanned = spanned_axes(weight, sizes, dilation)
    own = tuple(0 if by_hand else p for p, by_hand in zip(padding, spanned, strict=True))
    output = F.conv_transpose3d(volume, weight, bias, stride, own, output_padding, groups, dilation)
    for axis, low in enumerate(padding):
        if low != own[axis]:
            output = output.narrow(2 + axis, low, sizes[axis])
    return output


def _nearest(volume, axis: int, length: int):
    """Resample one axis by repetition."""
    size = volume.shape[axis]
    if length == size:
        return volume
    if length % size == 0:
        return volume.repeat_interleave(length // size, axis)
    index = torch.arange(length, device=volume.device) * size // length
    return volume.index_select(axis, index)


# ---- pooling


def _pool_arguments(run, kernel_size, stride, padding, dilation=1):
    """Kernel, stride, padding and dilation as triples ``(D, H, W)``."""
    kernel = pair(kernel_size)
    stride = kernel if stride is None or stride == [] else pair(stride)
    padding, dilation = pair(padding), pair(dilation)
    through = along_depth(kernel, stride, padding, dilation)
    if run.lift.depth_stride is not None:
        centred = 2 * through[2] == through[3] * (through[0] - 1)
        through = (through[0] if centred else run.lift.depth_stride, run.lift.depth_stride, *through[2:])
    return [(extra, *values) for extra, values in zip(through, (kernel, stride, padding, dilation), strict=True)]


def _slices_for_pool(run, volume, kernel, stride, padding, dilation):
    """The volume with its depth padded by repetition, for kind "2.5d", and the padding that is left to do.

    There depth shrinks by strides only, as by a ``(1, k, k)`` convolution: branches that pool and
    branches that convolve without padding still meet. Averages count no zeros from outside.
    """
    if run.lift.kind != "2.5d":
        return volume, padding
    low = high = padding[0]
    if kernel[0] > stride[0]:
        depth = volume.shape[2]
        total = (depth - 1) // stride[0] * stride[0] + dilation[0] * (kernel[0] - 1) + 1 - depth
        low, high = (low, total - low) if low else _split_pads(total)
    if low == high == 0:
        return volume, padding
    return F.pad(volume, (0, 0, 0, 0, low, high), "replicate"), (0, *padding[1:])


def _max_pool(run, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    if not is_image(input):
        result = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        if return_indices:
            return tuple(same_plane(run, input, one) for one in result)
        return same_plane(run, input, result)
    kernel, stride, padding, dilation = _pool_arguments(run, kernel_size, stride, padding, dilation)
    volume, padding = _slices_for_pool(run, run.volume(input), kernel, stride, padding, dilation)
    result = F.max_pool3d(volume, kernel, stride, padding, dilation, ceil_mode, return_indices)
    if return_indices:
        return tuple(run.like(input, one) for one in result)
    return run.like(input, result)


@replaces("max_pool2d", "max_pool3d")
def max_pool2d(run, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    return _max_pool(run, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@replaces("max_pool2d_with_indices", "max_pool3d")
def max_pool2d_with_indices(
    run, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True
):
    return _max_pool(run, input, kernel_size, stride, padding, dilation, ceil_mode, True)


@replaces("max_unpool2d", "max_unpool3d")
def max_unpool2d(run, input, indices, kernel_size, stride=None, padding=0, output_size=None):
    kernel, stride, padding, _ = _pool_arguments(run, kernel_size, stride, padding)
    if output_size is not None:
        height, width = output_size[-2:]
        depth = run.depth_of_plane(height, width, rows_of(input).depth * stride[0])
        output_size = (depth, height, width)
    volume = F.max_unpool3d(run.volume(input), run.volume(indices), kernel, stride, padding, output_size)
    return run.like(input, volume)


@replaces("avg_pool2d", "avg_pool3d")
def avg_pool2d(
    run,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    if not is_image(input):
        result = F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return same_plane(run, input, result)
    rows, kernel = rows_of(input), pair(kernel_size)
    listed = not isinstance(kernel_size, int) and len(kernel_size) == 2
    plane = tuple(input.shape[2:])
    if kernel == plane and pair(padding) == (0, 0) and (listed or kernel[0] > 3 or rows.depth < kernel[0]):
        return _global(run, input, F.adaptive_avg_pool3d, divisor_override)
    kernel, stride, padding, _ = _pool_arguments(run, kernel_size, stride, padding)
    volume = run.volume(input)
    volume, padding = _slices_for_pool(run, volume, kernel, stride, padding, (1, 1, 1))
    options = ceil_mode, count_include_pad, divisor_override
    return run.like(input, avg_pool3d(volume, kernel, stride, padding, *options))


def _global(run, input, pool, divisor=None):
    rows = rows_of(input)
    values = pool(run.volume(input), 1).flatten(2).squeeze(-1)
    if divisor is not None:
        values = values * (input.shape[2] * input.shape[3] / divisor)
    pooled = run.pooled(values[:, :, None, None], rows.depth)
    return pooled


@replaces("lp_pool2d", "lp_pool3d")
def lp_pool2d(run, input, norm_type, kernel_size, stride=None, ceil_mode=False):
    is_image(input)
    kernel, stride, _, _ = _pool_arguments(run, kernel_size, stride, 0)
    # lp_pool sums; per voxel of the depth kernel it is the 2D network's sum.
    volume = F.lp_pool3d(run.volume(input), norm_type, kernel, stride, ceil_mode) / kernel[0] ** (1 / norm_type)
    return run.like(input, volume)


def _adaptive(run, input, output_size, pool2d, pool3d):
    if not is_image(input):
        return same_plane(run, input, pool2d(input, output_size))
    height, width = pair(output_size)
    if height == width == 1:
        return _global(run, input, pool3d)
    if height is None or width is None or height != width:
        return same_plane(run, input, pool2d(input, output_size))
    return run.like(input, pool3d(run.volume(input), (height, height, width)))


@replaces("adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool2d(run, input, output_size):
    return _adaptive(run, input, output_size, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


@replaces("adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool2d(run, input, output_size, return_indices=False):
    if return_indices:
        raise LiftingError("indices of an adaptive maximum have no meaning in a volume")
    return _adaptive(run, input, output_size, F.adaptive_max_pool2d, F.adaptive_max_pool3d)


# ---- padding


@replaces("pad zero_pad2d", "padding in 3D")
def pad(run, input, pad, mode="constant", value=None):
    rows = rows_of(input)
    pads = list(pad)
    from_right = input.dim() - rows.axis
    if any(pads[2 * from_right - 2 : 2 * from_right]):
        raise LiftingError("it pads the batch, which would add slices")
    plain = F.pad(input, pads, mode) if mode != "constant" else F.pad(input, pads, mode, value)
    if input.dim() != 4 or rows.axis != 0 or rows.inner != 1 or len(pads) != 4 or not is_image(input) or rows.pooled:
        return mark(rows, plain)
    low, high = _depth_pads(run, input, plain, pads)
    plain = rows.replace(axes="rcpp").put_on(plain)
    if low == high == 0:
        return run.noted(plain)
    volume = run.volume(plain)
    if run.lift.kind == "2.5d" or (mode != "constant" and min(low, high) < 0):
        mode = "replicate"
    if mode == "constant":
        volume = F.pad(volume, (0, 0, 0, 0, low, high), mode, value)
    else:
        volume = F.pad(volume, (0, 0, 0, 0, low, high), mode)
    return run.slices(volume)


def _depth_pads(run, input, padded, pads) -> tuple[int, int]:
    """Padding of the depth axis for plane padding ``pads``."""
    left, right, top, bottom = pads
    depth = rows_of(input).depth
    if (left, right) != (top, bottom):
        same = _same_pads(run, input, depth, pads)
        if same is not None:
            return (0, 0) if run.lift.kind == "2.5d" else same
        wanted = run.depth_of_plane(padded.shape[2], padded.shape[3], depth)
        return _split_pads(wanted - depth)
    if run.lift.kind == "2.5d":
        # Depth is left alone, unless the pads complete an upsampling that fell short by them.
        seen = run.depth_of_plane(padded.shape[2], padded.shape[3], depth)
        return (top, bottom) if known_equal(seen - depth, top + bottom) else (0, 0)
    same = _same_pads(run, input, depth, pads)
    return (top, bottom) if same is None else same


def _split_pads(total: int) -> tuple[int, int]:
    """Padding before and after; a crop where negative."""
    return total // 2, total - total // 2


def _same_pads(run, input, depth, pads):
    """Depth padding where a layer pads by TensorFlow's "same" rule: from its own kernel and stride."""
    layer = run.layer
    kernel, stride = getattr(layer, "kernel_size", None), getattr(layer, "stride", None)
    if kernel is None or stride is None:
        return None
    kernel, stride, dilation = pair(kernel), pair(stride), pair(getattr(layer, "dilation", 1))
    if not all(isinstance(value, int) for value in (*kernel, *stride, *dilation)):
        return None

    def same(size, axis):
        total = max((-(-size // stride[axis]) - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 - size, 0)
        return _split_pads(total)

    if same(input.shape[2], 0) + same(input.shape[3], 1) != (pads[2], pads[3], pads[0], pads[1]):
        return None
    return same(depth, 0 if kernel[0] <= kernel[1] else 1)


# ---- resampling


@replaces("interpolate upsample", "interpolation in 3D")
def interpolate(
    run,
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    rows = rows_of(input)
    if input.dim() == 3:
        raise LiftingError("its input must be a batch of slices (N * D, C, H, W)")
    options = {"size": size, "scale_factor": scale_factor, "mode": mode, "align_corners": align_corners}
    options.update(recompute_scale_factor=recompute_scale_factor, antialias=antialias)
    if not is_image(input) or rows.pooled:
        return same_plane(run, input, F.interpolate(input, **options))
    if size is not None:
        height, width = (int(value) if isinstance(value, torch.Tensor) else value for value in pair(size))
        scaled = _round(rows.depth * height, input.shape[2])
    else:
        scale = pair(scale_factor)
        height, width = (_scaled(n, f) for n, f in zip(input.shape[2:], scale, strict=True))
        scaled = _scaled(rows.depth, run.lift.depth_stride or min(scale))
    depth = run.depth_of_plane(height, width, scaled if scaled >= 1 else 1)
    solid = {"bilinear": "trilinear", "nearest": "nearest", "nearest-exact": "nearest-exact", "area": "area"}.get(mode)
    if solid is None or antialias:
        flat = same_plane(run, input, F.interpolate(input, **options))
        if depth == rows.depth:
            return flat
        volume = F.interpolate(
            run.volume(flat), (depth, *flat.shape[2:]), mode="trilinear", align_corners=bool(align_corners)
        )
        return run.slices(volume)
    volume = run.volume(input)
    if size is None and depth is scaled and run.lift.depth_stride is None and not recompute_scale_factor:
        target = {"scale_factor": (min(scale), *scale)}
    else:
        target = {"size": (depth, height, width)}
    if solid.startswith("nearest"):
        return run.like(input, resize_nearest(volume, solid, **target))
    return run.like(input, F.interpolate(volume, mode=solid, align_corners=align_corners, **target))


def _scaled(size, factor):
    """``floor(size * factor)``, symbolic for whole factors."""
    return size * int(factor) if factor == int(factor) else int(size * factor)


def _round(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


@replaces("pixel_shuffle", "pixel shuffle, depth repeated")
def pixel_shuffle(run, input, upscale_factor):
    is_image(input)
    flat = same_plane(run, input, F.pixel_shuffle(input, upscale_factor))
    if rows_of(input).pooled:
        return flat
    depth = rows_of(input).depth
    depth = run.depth_of_plane(flat.shape[2], flat.shape[3], depth * upscale_factor)
    return run.slices(_nearest(run.volume(flat), 2, depth))


@replaces("pixel_unshuffle", "pixel unshuffle, depth averaged")
def pixel_unshuffle(run, input, downscale_factor):
    is_image(input)
    flat = same_plane(run, input, F.pixel_unshuffle(input, downscale_factor))
    if rows_of(input).pooled:
        return flat
    return run.slices(avg_pool3d(run.volume(flat), (downscale_factor, 1, 1), (downscale_factor, 1, 1), (0, 0, 0)))
