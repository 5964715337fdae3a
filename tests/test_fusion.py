"""``fuse``: the same numbers with fewer operations, or an error."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import acs_triton.fusion.modules as fusion
from acs_triton import FusionError, convert, fuse, standard_operators, use_backend
from acs_triton.activations import ACTIVATIONS
from acs_triton.frozen import FrozenParameter, supported
from acs_triton.lifting import KINDS, LiftingError
from acs_triton.models import LiftedUNet
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv


def spread_out(network):
    """Fresh scales and statistics (1 and 0) would hide errors."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in filter(torch.is_tensor, (module.weight, module.running_var)):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in filter(torch.is_tensor, (module.bias, module.running_mean)):
                nn.init.normal_(tensor, std=0.1)
    return network.eval()


def stages(network):
    """What each layer of a fused network computes besides its convolution."""
    return {path: " ".join(stage.name for stage in m._acs_stages) for path, m in fused_layers(network).items()}


def fused_layers(network):
    return {path: module for path, module in network.named_modules() if isinstance(module, fusion._Fused)}


def norms_left(network):
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return sum(norm.running_mean is not None for norm in norms)


def check(network, example, expected=None, **tolerance):
    """Fuse, compare the numbers, and return the fused network."""
    with torch.no_grad():
        wanted, fused = network(example), fuse(network, example)
        torch.testing.assert_close(fused(example), wanted, **tolerance)
        torch.testing.assert_close(network(example), wanted)  # still itself
    assert expected is None or stages(fused) == expected
    return fused


class Paths(nn.Module):
    """A stem read twice, functions in place, a norm without an activation, a shortcut."""

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = conv(3, 6, 3, padding=1)
        self.norm1 = norm(6)
        self.conv1 = conv(6, 5, 3, padding=1, stride=2, bias=False)
        self.norm2 = norm(5)
        self.conv2 = conv(5, 6, 1)
        self.norm3 = norm(6)
        self.shortcut = conv(6, 6, 3, padding=1, stride=2)
        self.conv3 = conv(6, 6, 3, padding=2, dilation=2, groups=3)
        self.conv4 = conv(6, 4, 3, padding=1)
        self.act4 = nn.GELU(approximate="tanh")

    def forward(self, x):
        x = self.stem(x)
        y = F.relu_(self.norm1(x))
        y = F.silu(self.norm2(self.conv1(y)), inplace=True)
        y = self.norm3(self.conv2(y)) + self.shortcut(x)
        y = F.gelu(self.conv3(F.dropout(y, training=self.training)))
        return self.act4(self.conv4(y))


PATHS = {"conv1": "norm2 silu", "conv2": "norm3", "conv3": "gelu", "conv4": "gelu_tanh"}


@pytest.mark.parametrize("kind", KINDS)
def test_lifted(kind):
    network = convert(spread_out(Paths().double()), kind)
    volume = torch.randn(2, 3, 4, 7, 6, dtype=torch.float64)
    fused = check(network, volume, PATHS)
    assert norms_left(fused) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused(volume[:, :, 0]), network(volume[:, :, 0]))  # images


@pytest.mark.parametrize("layer", [ACSConv, SoftACSConv, Conv2_5d])
def test_native(layer):
    network = spread_out(Paths(layer, nn.BatchNorm3d).double())
    check(network, torch.randn(2, 3, 4, 7, 6, dtype=torch.float64), PATHS)


def test_mean_and_padding_modes():
    layers = SoftACSConv(3, 6, 3, padding=1, mean=True), ACSConv(6, 4, 3, padding=1, padding_mode="reflect", stride=2)
    network = nn.Sequential(layers[0], nn.BatchNorm3d(6), nn.SiLU(), layers[1], nn.BatchNorm3d(4, affine=False))
    check(spread_out(network), torch.randn(1, 3, 4, 5, 6), {"0": "1 silu", "3": "4"})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backends_offer_the_same(activation):
    """The function's argument; what the kernels make of it, ``tests/kernels/test_epilogue.py`` checks."""
    from acs_triton.functional import acs_conv3d, conv2_5d, soft_acs_conv3d

    x, weight, shares = torch.randn(3, 4, 5, 4), torch.randn(6, 3, 3, 3), torch.rand(6, 3)
    function = {
        "relu": torch.relu,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }[activation]
    for call, args in ((acs_conv3d, ()), (soft_acs_conv3d, (shares,)), (conv2_5d, ())):
        expected = function(call(x, weight, *args, padding=1))
        with torch.no_grad(), use_backend("torch"):
            torch.testing.assert_close(call(x, weight, *args, padding=1, activation=activation), expected)
        inputs = [one.clone().requires_grad_() for one in (x, weight)]
        result = call(*inputs, *args, padding=1, activation=activation)
        torch.testing.assert_close(result, expected)
        wanted = torch.autograd.grad(function(call(*inputs, *args, padding=1)).sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad(result.sum(), inputs), wanted)
    with pytest.raises(ValueError, match=r"activation must be None or one of 'relu', .*, got 'tanh'"):
        acs_conv3d(x, weight, activation="tanh")


# ---- networks of the field


def torchvision_network(name):
    return getattr(pytest.importorskip("torchvision").models, name)(weights=None)


def timm_network(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


def smp_unet():
    return pytest.importorskip("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None)


def monai_unet():
    unet = pytest.importorskip("monai.networks.nets").UNet
    return unet(2, 3, 2, (4, 8, 16), (2, 2), num_res_units=2, norm="batch", act="relu")


NETWORKS = {
    # name: how it is made, kind, (layers with an activation, layers with a norm), norms left
    "resnet18": (lambda: torchvision_network("resnet18"), "acs", {"relu": 9}, 20, 0),
    "efficientnet_b0": (lambda: torchvision_network("efficientnet_b0"), "acs", {"silu": 49}, 49, 0),
    "mobilenet_v3_small": (lambda: torchvision_network("mobilenet_v3_small"), "2.5d", {"relu": 14}, 34, 0),
    "convnext": (lambda: timm_network("convnext_atto", conv_mlp=True), "acs", {"gelu": 12}, 0, 0),
    "norm and activation in one module": (lambda: timm_network("test_efficientnet"), "soft", {"silu": 11}, 13, 0),
    "smp.Unet": (smp_unet, "soft", {"relu": 19}, 30, 0),
    "monai.UNet": (monai_unet, "acs", {"relu": 7}, 7, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, kind, activations, norms, left = NETWORKS[name]
    network = convert(spread_out(make()), kind)
    fused = check(network, torch.randn(1, 3, 32, 32, 32), rtol=2e-5, atol=2e-5)
    all_stages = [stage for layer in fused_layers(fused).values() for stage in layer._acs_stages]
    found = Counter(stage.kind if stage.kind == "norm" else stage.name for stage in all_stages)
    assert (found.pop("norm", 0), dict(found), norms_left(fused)) == (norms, activations, left)


def test_lifted_encoder_in_a_native_network():
    network = spread_out(LiftedUNet(torchvision_network("resnet18"), classes=2))
    fused = check(network, torch.randn(1, 1, 32, 32, 32), rtol=1e-4, atol=1e-5)
    assert norms_left(fused) == 0
    assert len(fused_layers(fused)) == 30


# ---- what must not be fused


class Two(nn.Module):
    """A convolution and a norm; what ``between`` does with them is the test's."""

    def __init__(self, between, conv=nn.Conv2d):
        super().__init__()
        self.conv = conv(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.between = between
        self.flag = False

    def forward(self, x):
        return self.between(self, x)


def read_twice(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def read_through_a_view(net, x):
    y = net.conv(x)
    return net.norm(y) + y[:, :1]


def written(net, x):
    y = net.conv(x)
    y.mul_(2)
    return net.norm(y)


def returned(net, x):
    y = net.conv(x)
    return net.norm(y), y


def two_norms(net, x):
    return net.norm(net.conv(x)) + net.other(net.conv(x))


def norm_of_something_else_too(net, x):
    return net.norm(net.conv(x)) + net.norm(x[:, :1].expand(-1, 4, -1, -1))


def training_statistics(net, x):
    return F.batch_norm(net.conv(x), net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias, True)


def other_scale(net, x):
    return F.batch_norm(net.conv(x), net.norm.running_mean, net.norm.running_var, net.norm.weight * 2, net.norm.bias)


def weight_read_elsewhere(net, x):
    return net.norm(net.conv(x)) + F.conv2d(x, net.conv.weight, padding=1)


def scale_read_elsewhere(net, x):
    return net.norm(net.conv(x)) * net.norm.weight.mean()


UNFUSED = [
    weight_read_elsewhere,
    scale_read_elsewhere,
    read_twice,
    read_through_a_view,
    written,
    returned,
    two_norms,
    norm_of_something_else_too,
    training_statistics,
    other_scale,
]


@pytest.mark.parametrize("between", UNFUSED)
def test_other_readers(between):
    network = convert(spread_out(Two(between)))
    state = copy.deepcopy(network.state_dict())
    volume = torch.randn(2, 3, 3, 4, 5)
    with torch.no_grad():
        fused = fuse(network, volume)
        expected = network(volume)
        network.load_state_dict(state)  # as before the running statistics were moved
        torch.testing.assert_close(fused(volume), expected)
    assert stages(fused) == {}


def norm_read_twice(net, x):
    y = net.norm(net.conv(x))
    return F.silu(y) + y


def in_place_for_its_effect(net, x):
    y = net.norm(net.conv(x))
    F.relu_(y)
    return y * 2


def kept_and_changed_in_place(net, x):
    maps = [net.norm(net.conv(x))]
    return [*maps, F.relu_(maps[0])]


@pytest.mark.parametrize("between", [norm_read_twice, in_place_for_its_effect, kept_and_changed_in_place])
def test_only_the_norm(between):
    check(convert(spread_out(Two(between))), torch.randn(2, 3, 3, 4, 5), {"conv": "norm"})


def test_called_twice_with_the_same_stages():
    def shared_head(net, x):
        return F.relu(net.norm(net.conv(x))) - F.relu(net.norm(net.conv(x * 2)))

    check(convert(spread_out(Two(shared_head))), torch.randn(2, 3, 3, 4, 5), {"conv": "norm relu"})


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    """As timm's ``Conv2dSame``: something is done to the input first."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x / self.weight.norm(), self.weight, self.bias, self.stride, self.padding)


def plain(net, x):
    return net.norm(net.conv(x))


@pytest.mark.parametrize(("conv", "fusible"), [(Standardised, False), (Padded, True), (Scaled, False)])
def test_layers_with_a_forward_of_their_own(conv, fusible):
    network = convert(spread_out(Two(plain, conv)), "2.5d")
    check(network, torch.randn(2, 3, 3, 4, 5), {"conv": "norm"} if fusible else {})


@pytest.mark.parametrize("where", ["conv", "norm"])
def test_hooks_and_computed_weights_are_left_alone(where):
    network = convert(spread_out(Two(plain)))
    seen = []
    getattr(network, where).register_forward_hook(lambda *args: seen.append(args))
    assert stages(fuse(network)) == {}
    network = convert(spread_out(Two(plain)))
    parametrizations.weight_norm(network.conv)
    assert stages(fuse(network)) == {}


def test_layers_among_3d_modules():
    """There a layer is given whole volumes and folds them by itself; a block folds them for all its layers."""
    block = [nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()]
    layers = [nn.Conv3d(3, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sequential(*block)]
    check(convert(spread_out(nn.Sequential(*layers))), torch.randn(2, 3, 3, 4, 5), {"3.0": "3.1 relu"})


def test_training_norms_are_left_alone():
    network = convert(spread_out(Two(plain)))
    network.norm.train()
    assert stages(fuse(network)) == {}


# ---- paths that the watched run did not take


OTHER_PATHS = {
    "function": lambda net, x: F.max_pool2d(net.conv(x), 2),
    "binary": lambda net, x: torch.add(net.conv(x), 1),
    "second operand": lambda net, x: x.mean(1, keepdim=True) + net.conv(x),
    "attribute": lambda net, x: net.conv(x).mean(),
    "a function named like the norm": lambda net, x: torch.norm(net.conv(x)),
    "operator": lambda net, x: net.conv(x) * 2,
    "index": lambda net, x: net.conv(x)[:1],
    "comparison": lambda net, x: net.conv(x) == 0,
    "condition": lambda net, x: 1 if net.conv(x) else 0,
    "another norm": lambda net, x: net.other(net.conv(x)),
    "no norm": lambda net, x: F.relu(net.conv(x)),
    "the norm alone": lambda net, x: net.norm(x[:, :1].expand(-1, 4, -1, -1)),
    "another activation": lambda net, x: F.silu(net.norm(net.conv(x))),
    "convolution": lambda net, x: F.conv2d(net.norm(net.conv(x)), x.new_ones(1, 4, 1, 1)),
}


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_another_path_is_an_error(path):
    def switch(net, x):
        return OTHER_PATHS[path](net, x) if net.flag else F.relu(net.norm(net.conv(x)))

    fused = fuse(convert(spread_out(Two(switch))))
    assert stages(fused) == {"conv": "norm relu"}
    fused.flag = True
    for input in (torch.randn(2, 3, 3, 4, 5), torch.randn(2, 3, 4, 5)):
        with pytest.raises((FusionError, LiftingError), match=r"the output of conv before|folded into a convolution"):
            fused(input)


def test_layers_alone_and_training_are_errors():
    network = convert(spread_out(Two(plain)))
    fused, volume = fuse(network), torch.randn(1, 3, 3, 4, 5)
    with pytest.raises(FusionError, match="conv is fused with what follows it: run the network"):
        fused.norm(fused.conv(volume))
    with pytest.raises(RuntimeError, match=r"conv is fused for inference: call eval\(\)"):
        fused.train()(volume)
    with pytest.raises(ValueError, match=r"in training mode.*eval\(\)"):
        fuse(network.train())
    with pytest.raises(TypeError, match="got str"):
        fuse("resnet18")
    with pytest.raises(ValueError, match="convert it first"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    with pytest.raises(ValueError, match=r"does not run on example=\(1, 4, 3, 4, 5\)"):
        fuse(network.eval(), torch.empty(1, 4, 3, 4, 5))


# ---- state


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    network = convert(spread_out(Paths()))
    return network, fuse(network), torch.randn(1, 3, 4, 6, 5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network)), fuse])
def test_copies(pair, copied):
    _, fused, volume = pair
    other = copied(fused)
    assert stages(other) == stages(fused)
    with torch.no_grad():
        torch.testing.assert_close(other(volume), fused(volume), rtol=0, atol=0)
        other.conv1.weight.zero_()
    assert fused.conv1.weight.any()


def test_state_dict(pair):
    network, fused, volume = pair
    state = copy.deepcopy(fused.state_dict())
    assert set(network.state_dict()) - set(state) == {
        f"norm{number}.{name}"
        for number in (2, 3)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert set(state) - set(network.state_dict()) == {"conv1.bias"}
    other = fuse(convert(spread_out(Paths())))
    for options in ({}, {"assign": True}):
        other.load_state_dict(dict(state), **options)
        with torch.no_grad():
            torch.testing.assert_close(other(volume), fused(volume), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(network.state_dict())


def test_nothing_is_shared_and_tied_weights_stay_tied():
    network = Two(lambda net, x: net.second(net.conv(x)[:, :3]))
    network.second = nn.Conv2d(3, 4, 3)
    network.second.weight = network.conv.weight
    fused = fuse(convert(network.eval()))
    assert fused.second.weight is fused.conv.weight
    assert type(fused.conv.weight) is (FrozenParameter if supported() else nn.Parameter)
    mine = {tensor.data_ptr() for tensor in network.state_dict().values() if tensor.numel()}
    assert not mine & {tensor.data_ptr() for tensor in fused.state_dict().values() if tensor.numel()}
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_dtypes(pair):
    network, fused, volume = pair
    with torch.no_grad():
        expected = network(volume)
        half = copy.deepcopy(fused).bfloat16()
        torch.testing.assert_close(half(volume.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                torch.testing.assert_close(fused(volume).float(), expected, rtol=0.1, atol=0.1)
        torch.testing.assert_close(fused(volume), expected)


def test_gradient_of_the_input(pair):
    network, fused, volume = pair
    inputs = [volume.clone().requires_grad_() for _ in range(2)]
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net, x in zip((network, fused), inputs, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_compiled_and_exported(pair):
    _, fused, volume = pair
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fused(volume)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(volume), expected)
        exported = torch.export.export(fused, (volume,))
        torch.testing.assert_close(exported.module()(volume), expected)
    operators = Counter(node.target for node in exported.graph.nodes)
    assert operators[torch.ops.acs_triton.conv_act.default] == 3
    assert operators[torch.ops.aten.batch_norm.default] == 1
    with torch.no_grad(), standard_operators():
        exported = torch.export.export(fused, (volume,))
        torch.testing.assert_close(exported.module()(volume), expected)
    assert not any("acs_triton" in str(node.target) for node in exported.graph.nodes)
