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
from ..layout import write
from . import onednn
from .pieces import Fit, Slices, pieces_of


def suits(grad_output: Tensor, channels: int, geometry: Geometry) -> bool:
    """Whether the gradients are computed here.

    Args:
        channels: of the input.
    """
    return geometry.groups == channels == grad_output.shape[1] > 1 and onednn.usable(grad_output)


def gradients(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, geometry: Geometry, format: torch.memory_format
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the input, in ``format``, and of the weight; each needs the other one."""
    channels, total, for_weight = grad_output.shape[1], None, None
    if weight is not None:
        size = grad_output.shape[0], channels, *geometry.input_size
        total = torch.empty(size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format)
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
        grads = slices.of_output(piece.of_output(grad_output, 1))
        if for_weight is not None:
            images = slices.of_input(piece.of_output(input, 1))
            _weight_grad(piece.of_output(for_weight, 0), grads, images, slices)
            del images
        if total is not None:
            part = piece.of_output(total, 1)
            if slices.step > 1 or slices.count < part.shape[piece.view + 2]:
                part.zero_()
            planes = slices.planes_of_input(part)
            images = _input_grad(grads, piece.of_output(weight, 0), slices, planes.shape[3:])
            write(planes.transpose(1, 2), images.unflatten(0, planes.shape[:2]).transpose(1, 2))
            del images
        del grads  # before the next piece's are made
    return total, for_weight


def _weight_grad(result: Tensor, grads: Tensor, images: Tensor, slices: Slices) -> None:
    """Written to ``result`` ``(C, 1, u, v)``, of batches ``(M, C, U, V)``."""
    for taps, fit in slices.strips:
        strip = result[..., taps]
        if fit.outside:
            strip.zero_()
        else:
            strip.copy_(_backward(grads, fit.apply(images), strip, slices, fit, (False, True, False))[1])


def _input_grad(grads: Tensor, kernel: Tensor, slices: Slices, size) -> Tensor:
    """Batches ``(M, C, U, V)`` of images of a size."""
    fit = slices.mirrored
    if slices.stride == (1, 1) and not fit.outside:
        taps = kernel.flip(2, 3)
        return torch.mkldnn_convolution(
            fit.apply(grads), taps, None, fit.padding, (1, 1), slices.dilation, kernel.shape[0]
        )
    fit = slices.fit
    images = grads.new_empty((*grads.shape[:2], *fit.size(size)))  # its shape counts alone
    images = images.contiguous(memory_format=torch.channels_last)
    return fit.undo(_backward(grads, images, kernel, slices, fit, (True, False, False))[0])


def _backward(grads: Tensor, images: Tensor, kernel: Tensor, slices: Slices, fit: Fit, mask):
    return torch.ops.aten.convolution_backward(
        grads,
        images,
        kernel,
        None,
        slices.stride,
        fit.padding,
        slices.dilation,
        False,
        (0, 0),
        kernel.shape[0],
        mask,
    )
