"""ACS and Soft ACS as ONE ``conv3d``: odd kernels, equal on all axes, whose padding keeps the size at stride 1.

There the through-plane sample falls on the kernel's centre, so every 2D kernel is a plane of a
``(k, k, k)`` kernel that is zero elsewhere.
"""

import torch
import torch.nn.functional as F


def dense_weight(weight, shares):
    """``(O, C, k, k)`` and the share of each view ``(O, 3)`` to ``(O, C, k, k, k)``."""
    k = weight.shape[-1]
    full = weight.new_zeros(*weight.shape[:2], k, k, k)
    middle = torch.zeros(k, dtype=weight.dtype, device=weight.device)
    middle[k // 2] = 1
    for view, line in enumerate(("d", "h", "w")):
        plane = {"d": "hw", "h": "dw", "w": "dh"}[line]
        full = full + torch.einsum(f"oc{plane},{line},o->ocdhw", weight, middle, shares[:, view])
    return full


def check(weight, padding, dilation):
    k = weight.shape[-1]
    if k % 2 == 0 or weight.shape[-2] != k or padding != dilation * (k // 2):
        raise ValueError("the dense form needs an odd square kernel and padding = dilation * (k // 2)")


def dense_acs_conv3d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, split=None):
    """:func:`reference.acs_conv3d` through one dense kernel; ints only."""
    check(weight, padding, dilation)
    if split is None:
        split = [len(part) for part in torch.arange(len(weight)).tensor_split(3)]
    views = torch.repeat_interleave(torch.arange(3), torch.tensor(split))
    shares = F.one_hot(views, 3).to(weight)
    return F.conv3d(x, dense_weight(weight, shares), bias, stride, padding, dilation, groups)


def dense_soft_acs_conv3d(x, weight, view_weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """:func:`reference.soft_acs_conv3d` through one dense kernel; ints only."""
    check(weight, padding, dilation)
    return F.conv3d(x, dense_weight(weight, view_weight), bias, stride, padding, dilation, groups)
