"""The layers: padding modes, state, copies, attributes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from acs_triton.functional import acs_conv3d
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv


def pad(x, amount, mode):
    return F.pad(x, (amount,) * 6, mode=mode)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel_size": 5}, {"dilation": 2, "aligned": True}])
def test_padding_modes_pad_every_view(mode, options):
    options = {"kernel_size": 3, "padding": 2, **options}
    layer = ACSConv(2, 5, padding_mode=mode, dtype=torch.float64, **options)
    soft = SoftACSConv(2, 5, padding_mode=mode, dtype=torch.float64, **options)
    x = torch.randn(2, 2, 9, 7, 8, dtype=torch.float64)
    arguments = {key: options[key] for key in ("stride", "dilation") if key in options}
    # Geometrically, the padded volume is sampled where the unpadded one would be, moved by the padding.
    plain = ACSConv(2, 5, dtype=torch.float64, **options)
    plain.load_state_dict(layer.state_dict())
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    assert layer(x).shape == plain(x).shape
    if not options.get("stride"):
        torch.testing.assert_close(layer(x)[inner], plain(x)[inner])
    if options.get("aligned"):
        expected = reference.acs_conv3d(pad(x, 2, mode), layer.weight, layer.bias, aligned=True, **arguments)
        torch.testing.assert_close(layer(x), expected)
        mixed = reference.soft_acs_conv3d(
            pad(x, 2, mode), soft.weight, soft.view_weight, soft.bias, aligned=True, **arguments
        )
        torch.testing.assert_close(soft(x), mixed)
    assert not torch.allclose(layer(x), plain(x))


def test_replicated_border_of_a_constant_volume():
    layer = ACSConv(1, 3, 3, padding=1, padding_mode="replicate", bias=False)
    y = layer(torch.ones(1, 1, 4, 5, 6))
    torch.testing.assert_close(y, layer.weight.sum((1, 2, 3)).view(1, 3, 1, 1, 1).expand_as(y))


def test_non_square_kernel_with_reflection():
    layer = ACSConv(1, 3, (1, 5), padding=(0, 2), padding_mode="reflect", bias=False, dtype=torch.float64)
    x = torch.randn(1, 1, 5, 6, 7, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (1, 3, 5, 6, 7)
    torch.testing.assert_close(
        y[:, 0], F.conv3d(F.pad(x, (2, 2, 0, 0, 0, 0), mode="reflect"), layer.weight[:1, None])[:, 0]
    )
    padded = F.pad(x, (0, 0, 2, 2, 0, 0), mode="reflect")
    torch.testing.assert_close(y[:, 2], F.conv3d(padded, layer.weight[2:].unsqueeze(4))[:, 0])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_conv2_5d_padding_modes(mode):
    layer = Conv2_5d(2, 3, 3, padding=1, padding_mode=mode)
    plain = nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1), padding_mode=mode)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 4, 5, 6)
    torch.testing.assert_close(layer(x), plain(x))


LAYERS = [ACSConv(3, 4, 3, padding=1), SoftACSConv(3, 4, 3), SoftACSConv(3, 4, 3, mean=True), Conv2_5d(3, 4, 3)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: repr(layer)[:24])
def test_copies_and_pickles(layer):
    x = torch.randn(1, 3, 5, 5, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert list(twin.state_dict()) == list(layer.state_dict())


def test_attributes_and_keys_are_the_published_ones():
    layer = ACSConv(4, 6, 3, 2, 1, 1, 2, (1, 2, 3), False, "zeros")
    assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3, 3), (2, 2, 2), (1, 1, 1))
    assert (layer.groups, layer.acs_kernel_split, layer.bias) == (2, (1, 2, 3), None)
    assert list(SoftACSConv(3, 4, 3).state_dict()) == ["weight", "bias", "soft_w_core"]
    assert list(SoftACSConv(3, 4, 3, mean=True).state_dict()) == ["weight", "bias"]
    assert Conv2_5d(3, 4, 3).weight.shape == (4, 3, 1, 3, 3)
    assert "acs_kernel_split=(1, 2, 3)" in repr(layer)


def test_mean_is_the_mean_of_the_views():
    layer = SoftACSConv(2, 3, 3, padding=1, mean=True)
    x = torch.randn(1, 2, 5, 5, 5)
    views = []
    for view in range(3):
        split = tuple(3 if v == view else 0 for v in range(3))
        views.append(reference.acs_conv3d(x, layer.weight, padding=1, split=split))
    torch.testing.assert_close(layer(x), sum(views) / 3 + layer.bias.view(1, 3, 1, 1, 1))


def test_device_and_dtype():
    layer = ACSConv(2, 3, 3, device="meta", dtype=torch.float16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float16)
    assert layer(torch.empty(1, 2, 8, 8, 8, device="meta", dtype=torch.float16)).shape == (1, 3, 6, 6, 6)


def test_training_lowers_the_loss():
    net = nn.Sequential(ACSConv(1, 6, 3, padding=1), nn.ReLU(), SoftACSConv(6, 1, 3, padding=1))
    x = torch.randn(2, 1, 6, 6, 6)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), x.flip(2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_changed_attribute_counts_at_once():
    """What a layer's arguments amount to is kept between calls, until one of them is set."""
    torch.manual_seed(0)
    layer, x = ACSConv(2, 6, 3, padding=1), torch.randn(1, 2, 5, 6, 7)

    def check():
        expected = acs_conv3d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, split=layer.acs_kernel_split
        )
        assert torch.equal(layer(x), expected)

    check()
    for name, value in [
        ("padding", (2, 2, 2)),
        ("stride", [2, 2, 2]),
        ("dilation", 2),
        ("acs_kernel_split", (1, 2, 3)),
        ("weight", torch.nn.Parameter(torch.randn(6, 2, 1, 1))),
    ]:
        setattr(layer, name, value)
        check()
    layer.stride[0] = 1
    check()
    assert "_resolved" not in layer.__getstate__()
