"""Depthwise ACS convolution and its two gradients, without dot products: multiply-adds in registers.

Every channel has its own taps and belongs to one view, so one launch computes all three. The
convolution and the input gradient are one kernel with different program tables; what a program
does, and why, is told in :mod:`acs_triton.kernels.depthwise_plan`.

Supported: any kernel of at most 49 taps, stride, dilation, padding and channel multiplier;
float16, bfloat16, float32, and float64 in the interpreter. Sums are kept in float32 (float64).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..frozen import once
from ..geometry import Geometry
from ..layout import memory_format
from ..tables import keep
from . import autotune, device
from .channels_last import strides
from .depthwise_plan import (
    FIELDS,
    MAX_TAPS,
    Programs,
    Tile,
    candidates,
    conv_programs,
    conv_tile,
    input_grad_programs,
    largest_class,
    weight_grad_tile,
)
from .epilogue import activated
from .partials import accumulator, needs_int64, splits, sum_partials


def suits(geometry: Geometry, in_channels: int, out_channels: int) -> bool:
    """Whether these kernels compute a convolution: one input channel a group, at most 49 taps.

    A single input channel with many outputs is a dense convolution.
    """
    ku, kv = geometry.kernel_size
    return geometry.groups == in_channels and (in_channels > 1 or out_channels == 1) and ku * kv <= MAX_TAPS


def conv(input, weight, bias, geometry: Geometry, activation: str = ""):
    """Depthwise convolution.

    Args:
        input: ``(N, C, D, H, W)``, any strides.
        weight: ``(O, 1, ku, kv)`` of the same dtype, ``O`` a multiple of ``C``.
        bias: ``(O,)`` or None.
        geometry: with ``groups == C``.
        activation: of :data:`acs_triton.activations.ACTIVATIONS`, or none.

    Returns:
        ``(N, O, *geometry.output_size)`` in the memory format of ``input``.
    """
    multiplier = weight.shape[0] // input.shape[1]
    if multiplier > 1:
        input = input.repeat_interleave(multiplier, 1).contiguous(memory_format=memory_format(input))
    size = geometry.output_size
    stride, dtype = max(geometry.stride), input.dtype
    return _launch_conv(input, weight, bias, geometry, conv_programs, size, size, stride, dtype, activation)


def input_grad(grad_output, weight, geometry: Geometry):
    """Gradient of :func:`conv` with respect to its input.

    Args:
        grad_output: ``(N, O, *geometry.output_size)``, any strides.
        weight: ``(O, 1, ku, kv)``.

    Returns:
        ``(N, C, *geometry.input_size)`` in the memory format of ``grad_output``.
    """
    multiplier = weight.shape[0] // geometry.groups
    # Several output channels of one input channel may lie in different views: add them unrounded.
    dtype = grad_output.dtype if multiplier == 1 else accumulator(grad_output.dtype)
    size, class_size = geometry.input_size, largest_class(geometry)
    grad = _launch_conv(grad_output, weight, None, geometry, input_grad_programs, size, class_size, 1, dtype)
    if multiplier == 1:
        return grad
    grad = grad.unflatten(1, (geometry.groups, multiplier)).sum(2)
    return grad.to(grad_output.dtype, memory_format=memory_format(grad_output))


def weight_grad(grad_output, input, geometry: Geometry):
    """Gradient of :func:`conv` with respect to its weight; equal calls give equal bits.

    Args:
        grad_output: ``(N, O, *geometry.output_size)``, any strides.
        input: ``(N, C, *geometry.input_size)``, any strides.

    Returns:
        ``(O, 1, ku, kv)``, contiguous.
    """
    channels, (ku, kv) = grad_output.shape[1], geometry.kernel_size
    grad_weight = grad_output.new_empty((channels, 1, ku, kv))
    if grad_output.numel() == 0:
        return grad_weight.zero_()
    format = memory_format(grad_output)
    if channels > input.shape[1]:
        input = input.repeat_interleave(channels // input.shape[1], 1)
    grad_output, input = _unit_stride(grad_output, format), _unit_stride(input, format)
    channels_last = format == torch.channels_last_3d
    vector = _vector(channels_last, grad_output, input)
    samples = grad_output.shape[0]

    def run(tile):
        programs = conv_programs(geometry, vector, tile.channels)
        boxes = _boxes(geometry.output_size, tile)
        each, cuts = splits(
            len(programs.records),
            samples * boxes[0] * boxes[1] * boxes[2],
            grad_weight.numel(),
            device.current().multiprocessors,
        )
        partials = grad_output.new_empty((cuts, *grad_weight.shape), dtype=accumulator(grad_output.dtype))
        depthwise_weight_grad_kernel[(len(programs.records) * cuts,)](
            grad_output,
            input,
            partials,
            _table(programs, grad_output.device),
            len(programs.records),
            each,
            samples,
            *boxes,
            *_strides(grad_output, vector),
            *_strides(input, vector),
            channels,
            KU=ku,
            KV=kv,
            SLIDE=programs.slide if min(geometry.output_size[:2]) >= tile.rows else 0,
            ROWS=tile.rows,
            WIDTH=tile.width,
            CHANNELS=tile.channels,
            VECTOR=vector,
            CHANNELS_LAST=channels_last,
            INT64=needs_int64(grad_output, input),
            num_warps=tile.num_warps,
            **device.all_registers(),
        )
        sum_partials(partials, grad_weight)

    with device.of(grad_output):
        default = weight_grad_tile(channels_last, ku * kv)
        autotune.run(
            run,
            default,
            lambda: candidates("weight_grad", ku * kv, channels_last),
            depthwise_weight_grad_kernel,
            grad_weight,
            geometry,
            (samples, input.shape[1], channels),
            channels_last=channels_last,
        )
    return grad_weight


def _launch_conv(source, weight, bias, geometry, plan, size, class_size, stride, dtype, activation=""):
    """Correlate ``source`` with ``weight`` into ``size`` positions, by the programs that ``plan`` lists."""
    format = memory_format(source)
    target = torch.empty((*source.shape[:2], *size), dtype=dtype, device=source.device, memory_format=format)
    if target.numel() == 0:
        return target
    source = _unit_stride(source, format)
    taps = once(weight, "depthwise", lambda: _taps(weight))
    channels_last = format == torch.channels_last_3d
    vector = _vector(channels_last, source, target)

    def run(tile):
        programs = plan(geometry, vector, tile.channels)
        boxes = _boxes(class_size, tile)
        # ptxas saves too many registers, and spills some, in loops over taps of any size (bfloat16 on sm_90), for seven
        # taps over few rows (float16 on sm_80, bfloat16 on sm_90 and sm_120) and for activations (sm_90 and newer).
        few_rows = geometry.kernel_size[0] >= 7 and tile.rows <= 4
        few_registers = programs.slide and not few_rows and not activation
        depthwise_conv_kernel[(len(programs.records) * boxes[0] * boxes[1] * boxes[2] * source.shape[0],)](
            source,
            taps,
            source if bias is None else bias,
            target,
            _table(programs, source.device),
            len(programs.records),
            *boxes,
            *_strides(source, vector),
            *_strides(target, vector),
            weight.shape[0] // vector,
            int(bias is not None),
            KU=geometry.kernel_size[0] if programs.slide else 0,
            SLIDE=programs.slide,
            ROWS=tile.rows,
            WIDTH=tile.width,
            CHANNELS=tile.channels,
            VECTOR=vector,
            CHANNELS_LAST=channels_last,
            INT64=needs_int64(source, target),
            ACTIVATION=activation,
            num_warps=tile.num_warps,
            **({} if few_registers else device.all_registers()),
        )

    with device.of(source):
        default = conv_tile(class_size, channels_last, stride)
        autotune.run(
            run,
            default,
            lambda: candidates("conv", taps.shape[0], channels_last),
            depthwise_conv_kernel,
            target,
            geometry,
            (source.shape[0], geometry.groups, source.shape[1]),
            plan=plan.__name__,
            channels_last=channels_last,
        )
    return target


def _taps(weight):
    """``(taps, O)``: a thread needs a tap of several channels at once, and in the accumulator's precision."""
    taps = weight.new_empty((weight[0].numel(), weight.shape[0]), dtype=accumulator(weight.dtype))
    return taps.copy_(weight.flatten(1).t())


def _unit_stride(tensor, format):
    """``tensor``, or a copy, with the memory format's innermost axis at stride 1."""
    axis = 1 if format == torch.channels_last_3d else 4
    if tensor.shape[axis] == 1 or tensor.stride(axis) == 1:
        return tensor
    return tensor.contiguous(memory_format=format)


def _vector(channels_last: bool, *tensors) -> int:
    """Channels that every access may take as one aligned 16-byte vector; 1 if there are none."""
    vector = 16 // tensors[0].element_size()
    if not channels_last:
        return 1
    for tensor in tensors:
        n, _, *rest = strides(tensor)
        if tensor.data_ptr() % 16 or any(step % vector for step in (tensor.shape[1], n, *rest)):
            return 1
    return vector


def _strides(tensor, vector: int) -> tuple[int, ...]:
    """Strides of N, C, D, H, W; all but C's in vectors."""
    n, c, *rest = strides(tensor)
    return (n // vector, c, *(stride // vector for stride in rest))


def _boxes(size, tile: Tile) -> tuple[int, int, int]:
    return tuple(triton.cdiv(n, extent) for n, extent in zip(size, (tile.rows, tile.rows, tile.width), strict=True))


@keep(maxsize=1024)
def _table(programs: Programs, where: torch.device) -> torch.Tensor:
    """The program table on a device; cached, so that only a shape's first call copies."""
    return torch.tensor(programs.records, dtype=torch.int32, device=where)


# Sizes, strides and the alignment of pointers (VECTOR says it) stay plain run-time values: specialising
# on them (1, multiples of 16) would only multiply the binaries.
_CONV_SIZES = ("n_programs", "n_d", "n_h", "n_w", "channels", "biased")
_GRAD_SIZES = ("n_programs", "each", "samples", "n_d", "n_h", "n_w", "channels")
_FIELDS = tl.constexpr(FIELDS)
_STRIDES = tuple(f"s_{tensor}{axis}" for tensor in "xyg" for axis in "ncdhw")


@triton.jit
def _add(acc, i: tl.constexpr, value):
    """The tuple ``acc`` with ``value`` added to its member ``i``."""
    return acc[:i] + (acc[i] + value,) + acc[i + 1 :]  # noqa: RUF005 (Triton knows no unpacking)


@triton.jit
def _field(p_program, i: tl.constexpr):
    return tl.load(p_program + i)


@triton.jit
def _split(i, n):
    """Quotient and remainder of one division."""
    quotient = i // n
    return quotient, i - quotient * n


@triton.jit
def _inside(i, size):
    """Whether ``0 <= i < size``, in one comparison."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _positions(box_u, box_o, box_w, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Indices of a box's tile: row number ``o`` and column number ``W`` of each of its positions."""
    p = tl.arange(0, ROWS * WIDTH)
    return box_u * ROWS, box_o * ROWS + p // WIDTH, box_w * WIDTH + p % WIDTH


@triton.jit
def _window(p_program, CHANNELS: tl.constexpr, VECTOR: tl.constexpr):
    """Channels of a program's window; whether their vectors are read; whether they are its own."""
    # The multiplication shows the compiler the alignment.
    c = (_field(p_program, 1) // VECTOR) * VECTOR + tl.arange(0, CHANNELS)
    first, end = _field(p_program, 2), _field(p_program, 3)
    return c, c < tl.cdiv(end, VECTOR) * VECTOR, (c >= first) & (c < end)


@triton.jit
def _axis_strides(u, s_d, s_h, s_w, VECTOR: tl.constexpr, INT64: tl.constexpr):
    """Strides of the axes ``(u, o, W)`` in elements, as wide as offsets must be."""
    s_u, s_o = tl.where(u == 1, s_h, s_d), tl.where(u == 1, s_d, s_h)
    if INT64:
        s_u, s_o, s_w = s_u.to(tl.int64), s_o.to(tl.int64), s_w.to(tl.int64)
    return s_u * VECTOR, s_o * VECTOR, s_w * VECTOR


@triton.jit
def _sample(pointer, sample, stride, VECTOR: tl.constexpr):
    """Where a sample starts, known to the compiler as the start of a vector where there are any."""
    # The sum is made here: a hint on what is a parameter here would be lost when the call is inlined.
    pointer += sample.to(tl.int64) * stride * VECTOR
    return tl.multiple_of(pointer, 16) if VECTOR > 1 else pointer


@triton.jit
def _channel_offsets(c, s_c, CHANNELS_LAST: tl.constexpr, INT64: tl.constexpr):
    if INT64:
        c = c.to(tl.int64)
    return c if CHANNELS_LAST else c * s_c


@triton.jit(
    do_not_specialize=[*_CONV_SIZES, *_STRIDES[:10]], do_not_specialize_on_alignment=["p_x", "p_b", "p_y", "p_programs"]
)
def depthwise_conv_kernel(
    p_x,  # source
    p_w,  # (ku * kv, C) in the accumulator's precision
    p_b,  # (C,), where biased
    p_y,  # target
    p_programs,  # (n_programs, FIELDS)
    n_programs,
    n_d,  # boxes along D, H, W
    n_h,
    n_w,
    s_xn,  # in vectors, but for the channel's
    s_xc,
    s_xd,
    s_xh,
    s_xw,
    s_yn,
    s_yc,
    s_yd,
    s_yh,
    s_yw,
    channels,  # in vectors
    biased,
    KU: tl.constexpr,  # taps along u where rows slide
    SLIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    ACTIVATION: tl.constexpr = "",
):
    """One box, one window: ``y[i] = bias + sum over taps of weight * x``."""
    # Programs of one box come next to each other: they share its memory.
    box, program = _split(tl.program_id(0), n_programs)
    p_program = p_programs + program * _FIELDS
    box, box_w = _split(box, n_w)
    box, box_h = _split(box, n_h)
    sample, box_d = _split(box, n_d)

    u = _field(p_program, 0)
    i_u, i_o, i_w = _positions(tl.where(u == 1, box_h, box_d), tl.where(u == 1, box_d, box_h), box_w, ROWS, WIDTH)
    c, m_vector, m_own = _window(p_program, CHANNELS, VECTOR)
    n_u, n_v = _field(p_program, 4), _field(p_program, 5)
    w_0, w_u, w_v = _field(p_program, 6), _field(p_program, 7), _field(p_program, 8)
    base_u, base_o, base_w = _field(p_program, 9), _field(p_program, 10), _field(p_program, 11)
    delta_u, delta_o, delta_w = _field(p_program, 12), _field(p_program, 13), _field(p_program, 14)
    step_u, step_o, step_w = _field(p_program, 15), _field(p_program, 16), _field(p_program, 17)
    size_u, size_o, size_w = _field(p_program, 18), _field(p_program, 19), _field(p_program, 20)
    count_o, count_w = _field(p_program, 28), _field(p_program, 29)

    m_p = (i_o < count_o) & (i_w < count_w)
    x_u, x_o, x_w = i_u * step_u + base_u, i_o * step_o + base_o, i_w * step_w + base_w
    s_xu, s_xo, s_xw = _axis_strides(u, s_xd, s_xh, s_xw, VECTOR, INT64)
    p_x = _sample(p_x, sample, s_xn, VECTOR)
    o_x = _channel_offsets(c, s_xc, CHANNELS_LAST, INT64)[None, :]
    s_w = channels * VECTOR
    p_w += w_0 * s_w + c

    DTYPE: tl.constexpr = p_w.dtype.element_ty
    bias = tl.load(p_b + c, mask=m_vector & (biased != 0), other=0.0).to(DTYPE)[None, :]
    acc = (tl.zeros([ROWS * WIDTH, CHANNELS], DTYPE) + bias,) * ROWS

    for v in range(n_v):
        v_o, v_w = x_o + v * delta_o, x_w + v * delta_w
        inside = m_p & _inside(v_o, size_o) & _inside(v_w, size_w)
        m_x = inside[:, None] & m_vector[None, :]
        p_xv = p_x + (v_o * s_xo + v_w * s_xw)[:, None] + o_x
        if SLIDE:
            w = ()
            for t in tl.static_range(KU):
                w += (tl.load(p_w + (t * w_u + v * w_v) * s_w, mask=m_vector, other=0.0)[None, :],)
            for row in tl.static_range((ROWS - 1) * SLIDE + KU):
                at = x_u + row * delta_u
                x = tl.load(p_xv + at * s_xu, mask=m_x & _inside(at, size_u), other=0.0).to(DTYPE)
                for t in tl.static_range(KU):
                    if row >= t and (row - t) % SLIDE == 0 and (row - t) // SLIDE < ROWS:
                        acc = _add(acc, (row - t) // SLIDE, x * w[t])
        else:
            for t in range(n_u):
                w = tl.load(p_w + (t * w_u + v * w_v) * s_w, mask=m_vector, other=0.0)[None, :]
                for i in tl.static_range(ROWS):
                    at = x_u + i * step_u + t * delta_u
                    x = tl.load(p_xv + at * s_xu, mask=m_x & _inside(at, size_u), other=0.0).to(DTYPE)
                    acc = _add(acc, i, x * w)

    to_u, to_o, to_w = _field(p_program, 21), _field(p_program, 22), _field(p_program, 23)
    by_u, by_o, by_w = _field(p_program, 24), _field(p_program, 25), _field(p_program, 26)
    count_u = _field(p_program, 27)
    s_yu, s_yo, s_yw = _axis_strides(u, s_yd, s_yh, s_yw, VECTOR, INT64)
    p_y = _sample(p_y, sample, s_yn, VECTOR)
    p_y += ((i_o * by_o + to_o) * s_yo + (i_w * by_w + to_w) * s_yw)[:, None]
    p_y += _channel_offsets(c, s_yc, CHANNELS_LAST, INT64)[None, :]
    whole = tl.min(m_own.to(tl.int32), 0) == 1
    c_vector = c // VECTOR * VECTOR
    m_full = (c_vector >= _field(p_program, 2)) & (c_vector + VECTOR <= _field(p_program, 3))
    for i in tl.static_range(ROWS):
        y = activated(acc[i], ACTIVATION).to(p_y.dtype.element_ty)
        m_y = m_p & (i_u + i < count_u)
        p_yi = p_y + ((i_u + i) * by_u + to_u) * s_yu
        # A mask that differs within a vector forces stores of single elements: those of vectors of two views only.
        if whole:
            tl.store(p_yi, y, mask=m_y[:, None])
        else:
            tl.store(p_yi, y, mask=m_y[:, None] & m_full[None, :])
            if VECTOR > 1:
                tl.store(p_yi, y, mask=m_y[:, None] & (m_own & (m_full == 0))[None, :])


@triton.jit(
    do_not_specialize=[*_GRAD_SIZES, *_STRIDES[:5], *_STRIDES[10:]],
    do_not_specialize_on_alignment=["p_g", "p_x", "p_programs"],
)
def depthwise_weight_grad_kernel(
    p_g,  # gradient of the output
    p_x,  # input
    p_partial,  # (cuts, C, ku * kv)
    p_programs,  # (n_programs, FIELDS)
    n_programs,
    each,  # boxes a program takes
    samples,
    n_d,  # boxes along D, H, W
    n_h,
    n_w,
    s_gn,  # in vectors, but for the channel's
    s_gc,
    s_gd,
    s_gh,
    s_gw,
    s_xn,
    s_xc,
    s_xd,
    s_xh,
    s_xw,
    channels,
    KU: tl.constexpr,
    KV: tl.constexpr,
    SLIDE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
):
    """Sum of ``g * x`` over some boxes, for every tap of one window."""
    cut, program = _split(tl.program_id(0), n_programs)
    p_program = p_programs + program * _FIELDS

    u = _field(p_program, 0)
    c, m_vector, m_own = _window(p_program, CHANNELS, VECTOR)
    base_u, base_o, base_w = _field(p_program, 9), _field(p_program, 10), _field(p_program, 11)
    delta_u, delta_o, delta_w = _field(p_program, 12), _field(p_program, 13), _field(p_program, 14)
    step_u, step_o, step_w = _field(p_program, 15), _field(p_program, 16), _field(p_program, 17)
    size_u, size_o, size_w = _field(p_program, 18), _field(p_program, 19), _field(p_program, 20)
    count_u, count_o, count_w = _field(p_program, 27), _field(p_program, 28), _field(p_program, 29)
    s_gu, s_go, s_gw = _axis_strides(u, s_gd, s_gh, s_gw, VECTOR, INT64)
    s_xu, s_xo, s_xw = _axis_strides(u, s_xd, s_xh, s_xw, VECTOR, INT64)
    o_g = _channel_offsets(c, s_gc, CHANNELS_LAST, INT64)[None, :]
    o_x = _channel_offsets(c, s_xc, CHANNELS_LAST, INT64)[None, :]

    DTYPE: tl.constexpr = p_partial.dtype.element_ty
    acc = (tl.zeros([ROWS * WIDTH, CHANNELS], DTYPE),) * (KU * KV)

    for box in range(cut * each, min((cut + 1) * each, samples * n_d * n_h * n_w)):
        rest, box_w = _split(box, n_w)
        rest, box_h = _split(rest, n_h)
        sample, box_d = _split(rest, n_d)
        i_u, i_o, i_w = _positions(tl.where(u == 1, box_h, box_d), tl.where(u == 1, box_d, box_h), box_w, ROWS, WIDTH)
        m_p = (i_o < count_o) & (i_w < count_w)
        m_g = m_p[:, None] & m_vector[None, :]
        p_gb = _sample(p_g, sample, s_gn, VECTOR) + (i_o * s_go + i_w * s_gw)[:, None] + o_g
        p_xb = _sample(p_x, sample, s_xn, VECTOR) + o_x
        x_o, x_w = i_o * step_o + base_o, i_w * step_w + base_w
        if SLIDE:
            # The last box starts where it ends with the output. Rows of two boxes count half in each: zero
            # in one would not do, since zero times an infinite input is not zero.
            again = count_u - ROWS
            until = (tl.where(u == 1, n_h, n_d) - 1) * ROWS
            i_u = tl.minimum(i_u, again)
            x_u = i_u * step_u + base_u
            g = ()
            for i in tl.static_range(ROWS):
                share = tl.where((i_u + i >= again) & (i_u + i < until), 0.5, 1.0).to(DTYPE)
                g += (tl.load(p_gb + (i_u + i) * s_gu, mask=m_g, other=0.0).to(DTYPE) * share,)
            for row in tl.static_range((ROWS - 1) * SLIDE + KU):
                at = x_u + row * delta_u
                for v in tl.static_range(KV):
                    v_o, v_w = x_o + v * delta_o, x_w + v * delta_w
                    inside = m_p & _inside(v_o, size_o) & _inside(v_w, size_w) & _inside(at, size_u)
                    p_xv = p_xb + (v_o * s_xo + v_w * s_xw)[:, None] + at * s_xu
                    x = tl.load(p_xv, mask=inside[:, None] & m_vector[None, :], other=0.0).to(DTYPE)
                    for t in tl.static_range(KU):
                        if row >= t and (row - t) % SLIDE == 0 and (row - t) // SLIDE < ROWS:
                            acc = _add(acc, t * KV + v, x * g[(row - t) // SLIDE])
        else:
            for i in range(i_u, min(i_u + ROWS, count_u)):
                g = tl.load(p_gb + i * s_gu, mask=m_g, other=0.0).to(DTYPE)
                for v in tl.static_range(KV):
                    v_o, v_w = x_o + v * delta_o, x_w + v * delta_w
                    inside = m_p & _inside(v_o, size_o) & _inside(v_w, size_w)
                    m_x = inside[:, None] & m_vector[None, :]
                    p_xv = p_xb + (v_o * s_xo + v_w * s_xw)[:, None]
                    for t in tl.static_range(KU):
                        at = i * step_u + base_u + t * delta_u
                        x = tl.load(p_xv + at * s_xu, mask=m_x & _inside(at, size_u), other=0.0).to(DTYPE)
                        acc = _add(acc, t * KV + v, x * g)

    p_partial += (cut * channels + c) * (KU * KV)
    for tap in tl.static_range(KU * KV):
        tl.store(p_partial + tap, tl.sum(acc[tap], 0), mask=m_own)
