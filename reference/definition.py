"""The definition, view by view (Yang et al., arXiv:1911.10477, sections 3.1 and 3.3)."""

import torch
import torch.nn.functional as F

PLANE_AXES = {0: (1, 2), 1: (0, 2), 2: (0, 1)}  # view (= its through-plane axis) -> plane axes (u, v)


def in_plane(value, view):
    """An int, plane pair ``(u, v)`` or triple ``(D, H, W)`` as the two values on the view's plane axes."""
    if isinstance(value, int):
        return value, value
    if len(value) == 2:
        return tuple(value)
    return tuple(value[axis] for axis in PLANE_AXES[view])


def on_axis(value, axis):
    """The value that belongs to an axis for sizes and offsets; of a plane pair, D and H take u, W takes v."""
    if isinstance(value, int):
        return value
    return value[axis] if len(value) == 3 else value[(0, 0, 1)[axis]]


def same_padding(kernel, dilation, axis):
    """``padding='same'`` along one axis: positions before and after."""
    total = on_axis(dilation, axis) * (on_axis(kernel, axis) - 1)
    return total // 2, total - total // 2


def axis_padding(padding, kernel, dilation, axis):
    """Positions added before and after along one axis."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        return same_padding(kernel, dilation, axis)
    return (on_axis(padding, axis),) * 2


def output_size(size, kernel, stride, padding, dilation):
    """Sizes of ``nn.Conv3d`` with a ``(k, k, k)`` kernel."""
    sizes = []
    for axis in range(3):
        before, after = axis_padding(padding, kernel, dilation, axis)
        reach = on_axis(dilation, axis) * (on_axis(kernel, axis) - 1) + 1
        sizes.append((size[axis] + before + after - reach) // on_axis(stride, axis) + 1)
    return sizes


def through_plane_offset(size, out, kernel, stride, padding, dilation, aligned):
    """Position that output 0 reads on the axis that the kernel does not cover."""
    if aligned:
        return dilation * (kernel // 2) - padding
    if out == size or 2 * out == size:
        plain = (size + stride - 1) // stride
        if plain == out:
            return 0
    return kernel // 2 - padding


def take(volume, axis, positions):
    """Planes of a volume at the given positions along an axis; zeros where a position lies outside."""
    planes = []
    for position in positions:
        inside = 0 <= position < volume.shape[axis]
        plane = volume.select(axis, position if inside else 0)
        planes.append(plane if inside else torch.zeros_like(plane))
    return torch.stack(planes, axis)


def ungrouped(weight, groups):
    """The weight of the equal convolution with one group: zero between channels of different groups."""
    out_channels, per_group = weight.shape[:2]
    full = weight.new_zeros(out_channels, per_group * groups, *weight.shape[2:])
    for group, rows in enumerate(torch.arange(out_channels).chunk(groups)):
        columns = torch.arange(group * per_group, (group + 1) * per_group)
        full = full.index_put((rows[:, None], columns[None]), weight[rows])
    return full


def through_plane_positions(size, out, kernel, stride, padding, dilation, aligned, soft):
    """Position that each output reads on the axis that the kernel does not cover."""
    if soft and not aligned and out in (size, size / 2) and size <= stride:
        # ACSConv's uncropped view has one plane here, and the sum of the three views broadcasts it.
        return [0] * out
    offset = through_plane_offset(size, out, kernel, stride, padding, dilation, aligned)
    return [i * stride + offset for i in range(out)]


def view_conv3d(x, weight, view, stride, padding, dilation, aligned, soft=False):
    """One view: its planes picked along the through-plane axis, then a 2D kernel in the plane."""
    kernel = tuple(weight.shape[2:])
    size, axis = x.shape[2:], view
    out = output_size(size, kernel, stride, padding, dilation)
    positions = through_plane_positions(
        size[axis],
        out[axis],
        on_axis(kernel, axis),
        on_axis(stride, axis),
        axis_padding(padding, kernel, dilation, axis)[0],
        on_axis(dilation, axis),
        aligned,
        soft,
    )
    planes = take(x, axis + 2, positions)
    strides, dilations, pads = [1, 1, 1], [1, 1, 1], [0] * 6
    for i, plane_axis in enumerate(PLANE_AXES[view]):
        strides[plane_axis] = in_plane(stride, view)[i]
        dilations[plane_axis] = in_plane(dilation, view)[i]
        if isinstance(padding, str):
            # A plane axis takes the kernel's own extent there, also where u and v differ.
            spread = dilations[plane_axis] * (kernel[i] - 1)
            before = 0 if padding == "valid" else spread // 2
            after = 0 if padding == "valid" else spread - spread // 2
        else:
            before = after = in_plane(padding, view)[i]
        pads[4 - 2 * plane_axis], pads[5 - 2 * plane_axis] = before, after
    return F.conv3d(F.pad(planes, pads), weight.unsqueeze(axis + 2), None, strides, 0, dilations)


def add_bias(y, bias):
    return y if bias is None else y + bias.view(1, -1, 1, 1, 1)


def acs_conv3d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, split=None, aligned=False):
    """ACS convolution of ``(N, C, D, H, W)`` with ``(O, C / groups, ku, kv)``."""
    if split is None:
        split = [len(part) for part in torch.arange(len(weight)).tensor_split(3)]
    weight, first, outputs = ungrouped(weight, groups), 0, []
    for view, count in enumerate(split):
        if count:
            outputs.append(view_conv3d(x, weight[first : first + count], view, stride, padding, dilation, aligned))
        first += count
    return add_bias(torch.cat(outputs, 1), bias)


def soft_acs_conv3d(x, weight, view_weight, bias=None, stride=1, padding=0, dilation=1, groups=1, aligned=False):
    """Soft ACS convolution: all channels in all views, mixed by ``view_weight`` ``(O, 3)``."""
    weight, total = ungrouped(weight, groups), 0
    for view in range(3):
        y = view_conv3d(x, weight, view, stride, padding, dilation, aligned, soft=True)
        total = total + y * view_weight[:, view].view(1, -1, 1, 1, 1)
    return add_bias(total, bias)


def conv2_5d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, axis=-3):
    """2.5D convolution: the 2D kernel on every plane; an int stride is for all axes."""
    pads, spreads = [padding] * 3, [dilation] * 3
    pads[axis] = 0
    return F.conv3d(x, weight.unsqueeze(axis), bias, stride, pads, spreads, groups)
