"""What lifting refuses, and how it says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acs_triton.lifting import LiftingError, convert

VOLUME = torch.ones(2, 4, 6, 8, 8)


class Outer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner = Inner(function)

    def forward(self, x):
        return self.inner(x)


class Inner(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


REFUSED = {
    "an unknown function": (torch.fft.fft2, "has no rule for volumes"),
    "one slice": (lambda x: x[0], "would take slices out of a volume"),
    "some slices": (lambda x: x[1:], "would take slices out of a volume"),
    "a part of the batch": (lambda x: x.chunk(2), "splits along the batch"),
    "mean of the batch": (lambda x: x.mean(0), "runs over the batch"),
    "sum of everything": (lambda x: x.sum(), "runs over all axes"),
    "softmax of the batch": (lambda x: x.softmax(0), "works along the batch"),
    "cumulative sum of the batch": (lambda x: x.cumsum(0), "works along the batch"),
    "joined batches": (lambda x: torch.cat([x, x]), "concatenates along the batch"),
    "flipped batch": (lambda x: x.flip(0), "rearranges rows along the batch"),
    "repeated batch": (lambda x: x.repeat(2, 1, 1, 1), "repeats the batch"),
    "padded batch": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)), "pads the batch"),
    "batch in the channels": (
        lambda x: F.conv2d(x.reshape(1, -1, 8, 8), torch.ones(48, 1, 1, 1), groups=48),
        "must be a batch of slices",
    ),
    "product over the batch": (lambda x: x.flatten(1).T @ x.flatten(1), "sums over the batch"),
    "einsum over the batch": (lambda x: torch.einsum("bchw,bdhw->cd", x, x), "sums over the slices"),
    "slices of another depth": (lambda x: x + F.interpolate(F.max_pool2d(x, 2), (9, 9))[:, :, :8, :8], "meet"),
    "dynamic kernels": (lambda x: F.conv2d(x, x[:, :, :3, :3]), "kernel depends on the volume"),
    "values": (lambda x: x.tolist(), "has no rule for volumes"),
    "a given output": (lambda x: torch.add(x, 1, out=torch.empty_like(x)), "writes to a given tensor"),
    "in place on fewer slices": (
        lambda x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1).add_(x[:, :, :1, :1]),
        "works in place on",
    ),
    "a kernel that does not fit": (lambda x: F.conv2d(x, torch.ones(3, 4, 7, 7)), "larger than the padded input"),
    "wrong channels": (lambda x: F.conv2d(x, torch.ones(3, 5, 1, 1)), "channels"),
    "pooling below one voxel": (lambda x: F.max_pool2d(x, 7, 7), "(?i)too small"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, reason = REFUSED[name]
    with pytest.raises(LiftingError, match=reason) as error:
        convert(Outer(function))(VOLUME)
    assert "inner (Inner)" in str(error.value)
    assert "its tensors are" in str(error.value)


def test_a_2d_batch_is_not_refused():
    assert convert(Outer(lambda x: x.mean(0)))(torch.ones(2, 3, 4, 4)).shape == (3, 4, 4)


def test_a_mixed_module_that_does_not_take_volumes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.solid = nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1)

        def forward(self, x):
            *_, height, width = x.shape
            return self.flat(x.view(-1, 1, height, width)).view(x.shape[0], 1, height, width)

    with pytest.raises(LiftingError, match=r"the network itself \(Mixed\): it contains 3D modules \(solid\)"):
        convert(Mixed())(torch.ones(1, 1, 4, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "4d"}, ValueError, "kind must be one of 'acs', 'soft', 'mean', '2.5d', '3d', got '4d'"),
        ({"axis": 2}, ValueError, r"axis must be -3 \(D\), -2 \(H\) or -1 \(W\), got 2"),
        ({"inflation": "middle"}, ValueError, "inflation must be one of 'repeat', 'centre', got 'middle'"),
        ({"rules": {"nothing": {}}}, ValueError, "no module is named like 'nothing'"),
        ({"rules": {"*": {"stride": 1}}}, ValueError, r"rules\['\*'\] has unknown options \['stride'\]"),
        ({"rules": {"*": {"kind": "x"}}}, ValueError, "kind must be one of"),
        ({"rules": {"*": {"depth_stride": 0}}}, ValueError, "depth_stride must be a positive int, got 0"),
        ({"rules": 3}, TypeError, "rules must be a mapping"),
        ({"in_channels": 2}, ValueError, "the first convolution is grouped"),
    ],
)
def test_bad_arguments_leave_the_network_alone(arguments, error, message):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(error, match=message):
        convert(model, **arguments)
    assert type(model) is nn.Sequential
    assert type(model[0]) is nn.Conv2d


def test_no_convolution_to_adapt():
    with pytest.raises(ValueError, match="in_channels=1: the network has no Conv2d to adapt"):
        convert(nn.Linear(2, 2), in_channels=1)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        convert(lambda x: x)


def test_script_modules():
    with pytest.raises(LiftingError, match="convert the module it was made from"):
        convert(torch.jit.script(nn.Conv2d(1, 1, 1)))
