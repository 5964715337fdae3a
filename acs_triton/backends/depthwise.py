"""Depthwise layers on CPUs: their gradients on slices.

oneDNN has no 3D kernel for the gradients of depthwise layers. Of slices, a batch of images, it has 2D kernels for all;
those of the kernel's gradient are fast for kernels up to three wide and without dilation, so wider ones are cut into
strips, five times faster than oneDNN's own kernel for them. At stride 1 the input's gradient is a convolution of the
output's gradient with the mirrored kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Geometry
from ..layout import empty, write
from . import cpu_cost, forms
from .pieces import Fit, Slices, pieces_of


def gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry, format: torch.memory_format
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the input, in ``format``, and of the weight; each needs the other one."""
    channels, total, for_weight = grad_output.shape[1], None, None
    if weight is not None:
        total = empty(grad_output, (grad_output.shape[0], channels, *geometry.input_size), format)
    if input is not None:
        for_weight = input.new_empty(channels, 1, *geometry.kernel_size)
    for piece in pieces_of(geometry, channels, True):
        slices = piece.slices
        if piece.fit.outside or slices.count < 1:
            if total is not None:
                piece.of_output(total, 1).zero_()
            if for_weight is not None:
                piece.of_output(for_weight, 0).zero_()
            continue
        part = None if total is None else piece.of_output(total, 1)
        if part is not None and (slices.step > 1 or slices.count < part.shape[piece.view + 2]):
            part.zero_()
        planes = None if part is None else slices.planes_of_input(part)
        grads = slices.of_output(piece.of_output(grad_output, 1))
        images = None if input is None else slices.of_input(piece.of_output(input, 1))
        kernel = None if weight is None else piece.of_output(weight, 0)
        of_kernel = None if for_weight is None else piece.of_output(for_weight, 0)
        of_images = _compute(slices, grads, images, kernel, of_kernel, None if planes is None else planes.shape[3:])
        del grads, images  # before the next piece's are made
        if planes is not None:
            write(planes.transpose(1, 2), of_images.unflatten(0, planes.shape[:2]).transpose(1, 2))
        del of_images
    return total, for_weight


def _compute(slices: Slices, grads: Tensor, images, kernel, for_kernel, size) -> Tensor | None:
    """The gradient of images of a size, if there is a kernel; that of the kernel is written where there are images.

    Args:
        grads, images: batches ``(M, C, U, V)`` in channels-last memory.
        kernel, for_kernel: ``(C, 1, u, v)``.
    """
    mirrored = slices.mirrored if slices.stride == (1, 1) else ()
    strips = () if images is None else _strips(slices, grads, for_kernel)
    if kernel is not None and len(strips) == 1 and not mirrored:
        fit = slices.weight_fit
        of_images, of_kernel = _backward(slices, fit, grads, fit.apply(images), kernel, (True, True))
        for_kernel.copy_(of_kernel)
        return fit.undo(of_images)
    for taps, fit in strips:
        strip = for_kernel[..., taps]
        if fit.outside:
            strip.zero_()
        else:
            strip.copy_(_backward(slices, fit, grads, fit.apply(images), strip, (False, True))[1])
    if kernel is None:
        return None
    if mirrored:
        fit, taps = mirrored[0].fit, kernel.flip(2, 3)
        return torch.mkldnn_convolution(
            fit.apply(grads), taps, None, fit.padding, (1, 1), slices.dilation, kernel.shape[0]
        )
    fit = slices.fit
    images = empty(grads, (*grads.shape[:2], *fit.size(size)), torch.channels_last)  # its shape counts alone
    return fit.undo(_backward(slices, fit, grads, images, kernel, (True, False))[0])


def _strips(slices: Slices, grads: Tensor, kernel: Tensor) -> tuple[tuple[slice, Fit], ...]:
    """Parts of the kernel whose gradients take less time than that of the whole."""
    products = grads.numel() // kernel.shape[0] * kernel[0].numel()
    # Under anomaly detection a NaN of the output's gradient would meet the zeros laid around images for strips.
    if not torch.is_anomaly_enabled() and cpu_cost.strips_pay(products, kernel.shape[0], len(slices.strips)):
        return slices.strips
    return ((slice(None), slices.weight_fit),)


def _backward(slices: Slices, fit: Fit, grads: Tensor, images: Tensor, kernel: Tensor, mask: tuple[bool, bool]):
    how = slices.stride, fit.padding, slices.dilation, kernel.shape[0]
    return forms.backward(grads, images, kernel, *how, (*mask, False))[:2]
