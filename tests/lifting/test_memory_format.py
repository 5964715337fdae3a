"""A lifted network stays channels-last from input to output: layout copies, counted."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import acs_triton.models
from acs_triton import convert
from acs_triton.lifting.separable import avg_pool3d, resize_nearest

torchvision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


def last(tensor):
    """Whether a batch of slices or volumes is in channels-last memory and nothing else."""
    format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous(memory_format=format) and not tensor.is_contiguous()


def plain(tensor):
    format = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return tensor.is_contiguous() and not tensor.is_contiguous(memory_format=format)


class Changes(TorchDispatchMode):
    """Operators that take channels-last activations and return plain ones, or the other way round."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        given, made = ([one for one in tree_leaves(values) if is_activation(one)] for values in (args, result))
        if given and made and ((last(given[0]) and plain(made[0])) or (plain(given[0]) and last(made[0]))):
            self.seen[f"{func}: {tuple(given[0].shape)} -> {tuple(made[0].shape)}"] += 1
        return result


def is_activation(value):
    """Whether it is an activation, or the gradient of one, that is more than a few values a channel."""
    return isinstance(value, torch.Tensor) and value.dim() in (4, 5) and value.shape[-1] >= 5


def unet():
    return pytest.importorskip("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None, classes=1)


NETWORKS = {
    "resnet18": torchvision.resnet18,
    "densenet121": torchvision.densenet121,
    "mobilenet_v3_small": torchvision.mobilenet_v3_small,
    "unet": unet,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layout_changes(name):
    model = convert(NETWORKS[name]())
    x = torch.randn(1, 3, 32, 64, 64).to(memory_format=torch.channels_last_3d).requires_grad_()
    with Changes() as changes:
        model(x).square().sum().backward()
    assert not changes.seen
    assert last(x.grad)


def test_a_change_is_seen():
    x = torch.randn(1, 3, 8, 8, 8).to(memory_format=torch.channels_last_3d)
    with Changes() as changes:
        F.avg_pool3d(x, 1)
        x.contiguous()
    assert sum(changes.seen.values()) == 2


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("divisor", [None, 5])
def test_average_pooling_is_pytorchs(ceil_mode, divisor):
    x = torch.randn(2, 4, 7, 8, 9, dtype=torch.float64)
    for count_include_pad in (False, True):
        options = (3, 3, 2), (2, 2, 1), (1, 1, 0), ceil_mode, count_include_pad
        whole = divisor and 3 * divisor
        expected = F.avg_pool3d(x, *options, whole)
        torch.testing.assert_close(avg_pool3d(x, *options, divisor), expected)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("target", [{"size": (5, 12, 9)}, {"scale_factor": (2, 1.5, 3)}], ids=str)
def test_nearest_resampling_is_pytorchs(mode, target):
    x = torch.randn(2, 4, 7, 8, 9, dtype=torch.float64)
    expected = F.interpolate(x, mode=mode, **target)
    assert torch.equal(resize_nearest(x, mode, **target), expected)


@pytest.mark.parametrize(("name", "channels"), [("ACSUNet", 1), ("FCNResNet", 3), ("FCNVGG", 3)])
def test_acsconvs_networks_run_channels_last_inside(name, channels):
    """Volumes come and go in plain memory, with few channels; between, nothing changes."""
    network = getattr(acs_triton.models, name)(**({"pretrained": False} if channels == 3 else {}), num_classes=2)
    x = torch.randn(1, channels, 16, 16, 16, requires_grad=True)
    with Changes() as changes:
        y = network(x)
        y.square().sum().backward()
    assert y.is_contiguous()
    assert x.grad.is_contiguous()
    assert sum(changes.seen.values()) <= (2 if channels == 1 else 4)  # of volume, result, and their gradients
