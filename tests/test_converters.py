"""ACSConv's converters and the stand-in for its package."""

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from acs_triton import converters
from acs_triton.acsconv_compat import acs_conv_f
from acs_triton.lifting import is_lifted
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1, bias=False),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(2),
    ).double()


def native(conv):
    """What the published converters make of :func:`network`."""
    return nn.Sequential(
        conv(2, 6, 3, stride=2, padding=1),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        conv(6, 5, 3, padding=1, bias=False),
        nn.Upsample(scale_factor=2, mode="trilinear"),
        nn.AdaptiveAvgPool3d(2),
    ).double()


def mean(*args, **kwargs):
    return SoftACSConv(*args, mean=True, **kwargs)


def across_width(*args, **kwargs):
    return Conv2_5d(*args, unsqueeze_axis=-1, **kwargs)


CONVERTERS = [
    (converters.ACSConverter, {}, ACSConv),
    (converters.SoftACSConverter, {}, SoftACSConv),
    (converters.SoftACSConverter, {"mean": True}, mean),
    (converters.Conv2_5dConverter, {}, Conv2_5d),
    (converters.Conv2_5dConverter, {"unsqueeze_axis": -1}, across_width),
    (converters.Conv3dConverter, {}, nn.Conv3d),
    (converters.Conv3dConverter, {"i3d_repeat_axis": -1}, nn.Conv3d),
]


@pytest.mark.parametrize(("converter", "options", "conv"), CONVERTERS)
def test_equals_the_native_network(converter, options, conv):
    converted = converter(network(), **options)
    solid = native(conv)
    state = converted.state_dict()
    axis = options.get("unsqueeze_axis", -3)
    for key, value in solid.state_dict().items():
        if value.dim() == 5 and state[key].dim() == 4:
            state[key] = state[key].unsqueeze(axis)
    solid.load_state_dict(state, strict=True)
    volume = torch.randn(2, 2, 16, 24, 20, dtype=torch.float64)
    torch.testing.assert_close(converted(volume), solid(volume))
    fresh = converter(network(), **options)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(state, strict=True)
    fresh.eval()
    solid.eval()
    torch.testing.assert_close(fresh.model(volume), solid(volume))


@pytest.mark.parametrize(("converter", "options", "conv"), CONVERTERS)
def test_behaves_as_the_network(converter, options, conv):
    model = network().eval()
    image = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    expected = model(image)
    converted = converter(model, **options)
    assert converted.model is model
    assert is_lifted(model)
    assert not converted.training
    converted.extra = 3
    assert model.extra == 3
    assert repr(converted).startswith(f"{converter.__name__}(\nSequential(")
    torch.testing.assert_close(converted(image), expected)
    copied = copy.deepcopy(converted)
    assert copied.model is not model
    torch.testing.assert_close(copied(image), expected)
    with pytest.raises(AttributeError, match="nothing"):
        _ = converted.nothing


def test_repeated_axis_holds_the_2d_kernel():
    weight = network()[0].weight
    converted = converters.Conv3dConverter(network(), i3d_repeat_axis=-1)
    torch.testing.assert_close(converted.model[0].weight.sum(-1), weight)


def test_base_converter_names_what_is_missing():
    with pytest.raises(TypeError, match="BaseConverter converts to no kind"):
        converters.BaseConverter(network())


def test_function_in_the_published_order():
    volume, weight, bias = torch.randn(1, 2, 5, 6, 7), torch.randn(6, 2, 3, 3), torch.randn(6)
    layer = ACSConv(2, 6, 3, padding=1, acs_kernel_split=(1, 2, 3))
    layer.load_state_dict({"weight": weight, "bias": bias})
    found = acs_conv_f(volume, weight, bias, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, 6, (1, 2, 3))
    torch.testing.assert_close(found, layer(volume))


PROGRAM = """
import acs_triton.acsconv_compat as compat
compat.install()
import acsconv, acsconv.operators, acsconv.utils
from acsconv.converters import ACSConverter, Conv2_5dConverter, Conv3dConverter, SoftACSConverter
from acsconv.converters.base_converter import BaseConverter
from acsconv.operators import ACSConv, Conv2_5d, SoftACSConv
from acsconv.operators.functional import acs_conv_f
from acsconv.utils import _pair_same, _to_triple, _triple_same
import acs_triton.converters, acs_triton.operators
assert ACSConverter is acs_triton.converters.ACSConverter and issubclass(ACSConverter, BaseConverter)
assert acsconv.operators.ACSConv is acs_triton.operators.ACSConv is ACSConv
assert _triple_same(3) == (3, 3, 3) and _pair_same([2, 2]) == (2, 2) and _to_triple((1, 2, 3)) == (1, 2, 3)
assert "acs_triton" in acsconv.operators.ACSConv.__module__
"""


def test_acsconv_resolves_to_this_library():
    """In a process of its own: the replacement lasts."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(importlib.util.find_spec("acsconv") is None, reason="acsconv is not installed")
@pytest.mark.parametrize("name", ["ACSConverter", "SoftACSConverter"])
def test_checkpoints_of_the_published_converters_load(name):
    """Without its pooling and norm layers, which the published converters cannot take on current PyTorch."""
    published = importlib.import_module("acsconv.converters")
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, bias=False)]
    theirs = getattr(published, name)(nn.Sequential(*copy.deepcopy(layers)))
    ours = getattr(converters, name)(nn.Sequential(*layers))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    volume = torch.randn(1, 2, 8, 8, 8)
    torch.testing.assert_close(ours(volume), theirs(volume), rtol=1e-4, atol=1e-4)
