"""Lifting leaves a network's state alone, and works however the network is called."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from acs_triton import LiftingError
from acs_triton.lifting import KINDS, convert
from acs_triton.operators import ACSConv, SoftACSConv


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + F.relu(self.norm(self.conv(x)))


def plainly(function, *args):
    return function(*args)


class Network(nn.Module):
    """How the blocks are called is a parameter: plainly, or through a kind of checkpoint."""

    def __init__(self, call=plainly):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(6, 4)
        self.call = call

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(self.pool(x).mean((2, 3)))


def network(call=plainly):
    torch.manual_seed(0)
    return Network(call).double()


@pytest.fixture
def volume():
    return torch.randn(2, 1, 8, 12, 16, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_untouched(kind):
    model = network()
    model.blocks[1].conv.weight = model.blocks[0].conv.weight  # tied
    model.blocks[0].eval()
    model.stem.weight.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    parameters, modes = dict(model.named_parameters()), [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    text = repr(model)
    assert convert(model, kind) is model
    assert isinstance(model, Network)
    assert isinstance(model.stem, nn.Conv2d)
    assert type(model).__name__ == "Network"
    assert repr(model) == text
    assert [name for name, _ in model.named_modules()] == names
    assert [module.training for module in model.modules()] == modes
    assert not model.stem.weight.requires_grad
    assert model.blocks[1].conv.weight is model.blocks[0].conv.weight
    assert [key for key in model.state_dict() if "soft_w_core" not in key] == list(state)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    for name, parameter in parameters.items():
        if not (kind == "3d" and parameter.dim() == 4):
            assert model.get_parameter(name) is parameter
    model.load_state_dict(state, strict=True)  # a 2D checkpoint
    for key, value in state.items():
        if value.dim() < 4 or kind != "3d":
            assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, volume):
    model = convert(network(), kind).eval()
    expected = model(volume)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert isinstance(copied, Network)
        assert torch.equal(copied(volume), expected)
        assert copied.stem.weight is not model.stem.weight


@pytest.mark.parametrize("kind", KINDS)
def test_converting_twice_is_harmless(kind, volume):
    model = convert(network(), kind).eval()
    expected, keys = model(volume), list(model.state_dict())
    assert torch.equal(convert(model, kind)(volume), expected)
    assert list(model.state_dict()) == keys


def test_another_kind():
    model = convert(network(), "acs")
    convert(model, "2.5d")
    with pytest.raises(ValueError, match=r"kind '2\.5d', whose parameters differ from kind '3d'"):
        convert(model, "3d")


@pytest.mark.parametrize(("kind", "native"), [("acs", ACSConv), ("soft", SoftACSConv), ("3d", nn.Conv3d)])
def test_checkpoints_of_native_networks_load(kind, native, volume):
    solid = nn.Sequential(native(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), native(6, 2, 1)).double()
    flat = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).double()
    convert(flat, kind).load_state_dict(solid.state_dict(), strict=True)
    torch.testing.assert_close(flat(volume), solid(volume))


def test_native_3d_networks_pass_through(volume):
    solid = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Upsample(scale_factor=2), nn.ReLU()).double()
    expected = solid(volume)
    assert torch.equal(convert(solid)(volume), expected)


def test_a_2d_encoder_inside_a_3d_network(volume):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Conv3d(1, 1, 1)
            self.encoder = network()
            self.after = nn.Conv3d(6, 1, 1)

        def forward(self, x):
            assert x.dim() == 5
            features = self.encoder.blocks[0](self.encoder.stem(self.before(x)))
            assert features.dim() == 5
            return self.after(features)

    assert convert(Mixed().double())(volume).shape == (2, 1, 4, 6, 8)


def test_parametrizations(volume):
    model = network()
    parametrizations.weight_norm(model.stem)
    parametrizations.spectral_norm(model.blocks[0].conv)
    convert(model).eval()
    expected = model(volume)
    parametrize.remove_parametrizations(model.stem, "weight")
    parametrize.remove_parametrizations(model.blocks[0].conv, "weight")
    torch.testing.assert_close(model(volume), expected)
    assert "parametrizations" not in "".join(model.state_dict())
    later = convert(network()).eval()
    before = later(volume)
    parametrizations.weight_norm(later.stem)
    torch.testing.assert_close(later(volume), before)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_computed_by_a_layer(kind, volume):
    class Standardized(nn.Conv2d):
        def forward(self, x):
            mean = self.weight.mean(dim=(1, 2, 3), keepdim=True) if self.weight.dim() == 4 else 0
            return F.conv2d(x, self.weight - mean, self.bias, self.stride, self.padding)

    layer = convert(Standardized(1, 4, 3, padding=1).double(), kind)
    layer(volume).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


# ---- ways to call


def test_submodules_take_volumes(volume):
    model = convert(network()).eval()
    features = model.stem(volume)
    for block in model.blocks:
        features = block(features)
    pooled = model.pool(features)
    assert pooled.shape == (2, 6, 2, 3, 4)
    torch.testing.assert_close(model.head(pooled.mean((2, 3, 4))), model(volume))


def test_hooks_see_volumes(volume):
    model = convert(network()).eval()
    expected = model(volume)
    shapes = []
    model.blocks[0].conv.register_forward_hook(lambda module, args, result: shapes.append(result.shape))
    model.blocks[1].register_forward_pre_hook(lambda module, args: (args[0] * 1,))
    model.blocks[1].register_forward_hook(lambda module, args, result: result * 1)
    model.head.register_forward_hook(lambda module, args, result: shapes.append(result.shape))
    model.pool.register_full_backward_hook(lambda module, before, after: shapes.append(before[0].shape))
    result = model(volume)
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert shapes == [(2, 6, 4, 6, 8), (2, 4), (2, 6, 4, 6, 8)]


def test_a_hook_does_not_change_vectors_of_slices(volume):
    model = convert(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 2)).double())
    expected = model(volume)
    model[1].register_forward_hook(lambda module, args, result: None)
    assert expected.shape == (2, 2)
    assert torch.equal(model(volume), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, volume):
    def call(function, x):
        return checkpoint(function, x, use_reentrant=reentrant)

    gradients = []
    for model in (network(), network(call)):
        convert(model)
        deep, wide = model(volume), model(volume[:, :, :4, :, :].flip(4) * 2)  # two forwards, one backward
        (deep.square().sum() + wide.square().sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_what_is_no_module(reentrant, volume):
    """What is recomputed around the modules mixes positions as in the first pass: within volumes."""

    def around(block, x):
        joined = torch.cat([x, F.interpolate(F.max_pool2d(x, 2), x.shape[2:])], 1).unflatten(1, (2, -1)).sum(1)
        y = block(F.avg_pool2d(joined, 3, 1, 1))
        return y * y.mean((2, 3), keepdim=True)

    def call(block, x):
        return checkpoint(around, block, x, use_reentrant=reentrant)

    gradients = []
    for model in (network(around), network(call)):
        model.blocks[0].requires_grad_(False)
        convert(model)
        deep, wide = model(volume), model(volume.repeat(1, 1, 2, 1, 1))
        image = model(volume[:, :, 0])  # recomputed as an image
        (deep.square().sum() + wide.square().sum() + image.square().sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_memory_efficient_densenet():
    models = pytest.importorskip("torchvision").models
    gradients = []
    for efficient in (False, True):
        torch.manual_seed(0)
        options = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 4, "num_classes": 3}
        model = convert(models.DenseNet(memory_efficient=efficient, **options)).double()
        model(torch.randn(2, 3, 16, 32, 24, dtype=torch.float64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_images(reentrant, volume):
    image = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    gradients = []
    for model in (network(), network(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))):
        convert(model)
        of_volume = model(volume)  # is alive while the images' checkpoints are recomputed
        model(image).sum().backward()
        of_volume.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_threads():
    model = convert(network()).eval()
    volumes = [torch.randn(1 + index % 3, 1, 4 + 2 * index, 8, 8, dtype=torch.float64) for index in range(6)]
    expected = [model(volume) for volume in volumes]
    found = [None] * len(volumes)

    def work(index):
        found[index] = model(volumes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(volumes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_functional_call_and_replicas(volume):
    model = convert(network()).eval()
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    found = torch.func.functional_call(model, doubled, (volume,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(found, model(volume))
    assert torch.equal(model._replicate_for_data_parallel().forward(volume), model(volume))


def test_autocast(volume):
    model = convert(network().float()).eval()
    expected = model(volume.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(volume.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported(kind, volume):
    model = convert(network(), kind).eval()
    with torch.no_grad():
        expected = model(volume)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(volume), expected)
        exported = torch.export.export(model, (volume,)).module()
        torch.testing.assert_close(exported(volume), expected)
    torch.compiler.reset()


def test_exported_for_any_size(volume):
    """Upsampling to the size of a skip connection included: no size is fixed."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.mix = nn.Conv2d(5, 2, 3, padding=1)

        def forward(self, x):
            return self.mix(torch.cat([x, F.interpolate(self.down(x), x.shape[2:], mode="bilinear")], 1))

    model = convert(Skip().double()).eval()
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO, 4: torch.export.Dim.AUTO}
    with torch.no_grad():
        exported = torch.export.export(model, (volume,), dynamic_shapes=(sizes,)).module()
        for depth, height, width in ((8, 12, 16), (10, 18, 14), (14, 10, 22)):
            other = torch.randn(2, 1, depth, height, width, dtype=torch.float64)
            torch.testing.assert_close(exported(other), model(other))


def test_images_may_have_tensors_of_five_axes():
    class Paths(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = Mix()

        def forward(self, x):
            return self.mix(torch.stack([x, 2 * x], 1))

    class Mix(nn.Module):
        def forward(self, x):
            return x.sum(1).mean((2, 3))

    model = convert(Paths())
    image = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(model(image), 3 * image.mean((2, 3)))
    volume = torch.randn(2, 3, 6, 4, 5)
    torch.testing.assert_close(model(volume), 3 * volume.mean((2, 3, 4)))


def test_feature_extractor(volume):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    graph = convert(extraction.create_feature_extractor(network().eval(), ["stem", "pool"]))
    for module in (graph, copy.deepcopy(graph)):
        assert {name: value.shape for name, value in module(volume).items()} == {
            "stem": (2, 6, 4, 6, 8),
            "pool": (2, 6, 2, 3, 4),
        }


class Activations(nn.Module):
    """What torch.compile does not ask torch function modes about by itself, and a dropout of whole volumes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.hard, self.drop = nn.Hardswish(inplace=True), nn.Dropout(0.5)

    def forward(self, x):
        x = F.pad(self.hard(self.first(x)), (1, 1, 0, 0))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([right, F.silu(left)], 1)
        gate = F.hardsigmoid(F.adaptive_avg_pool2d(self.second(x), 1))
        x = self.second(F.hardswish(x * gate)) + F.tanh(x) * F.sigmoid(x)
        return self.drop(F.threshold(x, 0.1, 0.0).mean((2, 3)))


def test_compiled_activations_keep_the_volumes(volume):
    model = convert(Activations().double()).eval()
    expected = model(volume)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(volume), expected)
    torch.compiler.reset()
    assert expected.shape == (2, 4)


def test_a_compiled_network_that_loses_its_slices_is_refused(volume):
    class Lost(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            with torch._C.DisableTorchFunction():
                x = x * 2
            return F.conv2d(x, self.conv.weight)

    model = convert(Lost().double())
    with pytest.raises(Exception, match="no torch function computed it"):
        torch.compile(model, fullgraph=True, backend="eager")(volume)
    torch.compiler.reset()
    with pytest.raises(LiftingError, match="no torch function computed it"):
        model(volume)
