"""The same numbers as the published ACSConv 0.1.1, wherever it returns a result of nn.Conv3d's size."""

import contextlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from acs_triton import operators as ours

published = pytest.importorskip("acsconv.operators", reason="the published ACSConv is not installed")

outcomes = {"compared": 0, "it fails": 0}


@st.composite
def configurations(draw):
    kind = draw(st.sampled_from(["ACSConv", "depthwise", "soft", "mean"]))
    depthwise = kind == "depthwise" or (kind in ("soft", "mean") and draw(st.booleans()))
    in_channels = draw(st.integers(1, 7))
    out_channels = in_channels if depthwise else draw(st.integers(1, 8))
    options = {
        "kernel_size": draw(st.integers(1, 5)),
        "stride": draw(st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 2)] * 3))),
        "padding": draw(st.one_of(st.integers(0, 3), st.tuples(*[st.integers(0, 2)] * 3))),
        "dilation": draw(st.integers(1, 2)),
        "groups": in_channels if depthwise else 1,
        "bias": draw(st.booleans()),
    }
    if kind in ("soft", "mean"):
        options["mean"] = kind == "mean"
    elif draw(st.booleans()):
        axial = draw(st.integers(0, out_channels))
        coronal = draw(st.integers(0, out_channels - axial))
        options["acs_kernel_split"] = (axial, coronal, out_channels - axial - coronal)
    size = draw(st.tuples(*[st.integers(2, 9)] * 3))
    name = "SoftACSConv" if kind in ("soft", "mean") else "ACSConv"
    return name, in_channels, out_channels, size, options, draw(st.booleans())


def written_out(layer, x):
    """The layer's numbers by the definition in ``reference``."""
    options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    if isinstance(layer, ours.SoftACSConv):
        return reference.soft_acs_conv3d(x, layer.weight, layer.view_weight, layer.bias, **options)
    return reference.acs_conv3d(x, layer.weight, layer.bias, split=layer.acs_kernel_split, **options)


def gradients(layer, x, y, grad):
    leaves = (x, *layer.parameters())
    return torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)


@settings(max_examples=500)
@given(configurations())
def test_output_and_gradients(configuration):
    name, in_channels, out_channels, size, options, channels_last = configuration
    torch.manual_seed(0)
    theirs = getattr(published, name)(in_channels, out_channels, **options).double()
    mine = getattr(ours, name)(in_channels, out_channels, **options, dtype=torch.float64)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, in_channels, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    dense = {key: options[key] for key in ("kernel_size", "stride", "padding", "dilation")}
    try:
        wanted_shape = nn.Conv3d(in_channels, out_channels, **dense).double()(x).shape
    except RuntimeError:
        with pytest.raises(ValueError, match="larger than the padded input"):
            mine(x)
        return
    try:
        expected, source = theirs(x), theirs
        ran = expected.shape == wanted_shape
    except (RuntimeError, AssertionError):
        ran = False
    if not ran:
        expected, source = written_out(mine, x), mine
    outcomes["compared" if ran else "it fails"] += 1
    found = mine(x)
    assert found.shape == wanted_shape
    grad = torch.randn_like(found)
    pairs = zip(
        (found, *gradients(mine, x, found, grad)), (expected, *gradients(source, x, expected, grad)), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_both_outcomes_were_seen():
    if sum(outcomes.values()):
        assert outcomes["compared"] > 100
        assert outcomes["it fails"] > 50


@pytest.mark.parametrize("name", ["ACSConv", "SoftACSConv"])
def test_same_seed_same_parameters(name):
    torch.manual_seed(3)
    theirs = getattr(published, name)(4, 7, 3).state_dict()
    torch.manual_seed(3)
    mine = getattr(ours, name)(4, 7, 3).state_dict()
    assert list(theirs) == list(mine)
    assert all(torch.equal(theirs[key], mine[key]) for key in theirs)


@pytest.mark.parametrize("axis", [-3, -2, -1])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2_5d(axis, stride):
    theirs = published.Conv2_5d(3, 4, 3, stride, 1, unsqueeze_axis=axis).double()
    mine = ours.Conv2_5d(3, 4, 3, stride, 1, unsqueeze_axis=axis).double()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 6, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_a_checkpoint_of_its_network_loads():
    with contextlib.redirect_stdout(io.StringIO()):
        from acsconv.models.acsunet import ACSUNet
    theirs = ACSUNet(3).double().eval()
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)

    def replaced(module):
        for name, child in module.named_children():
            if isinstance(child, published.ACSConv):
                options = ("kernel_size", "stride", "padding", "dilation", "groups", "acs_kernel_split")
                arguments = {option: getattr(child, option) for option in options}
                setattr(module, name, ours.ACSConv(child.in_channels, child.out_channels, **arguments))
            else:
                replaced(child)
        return module

    mine = replaced(ACSUNet(3)).double().eval()
    mine.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    x = torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-9, atol=1e-9)
