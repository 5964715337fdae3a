"""Lifted networks compute what their 3D counterparts compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from acs_triton.lifting import KINDS, LiftingError, check_lifting, convert, describe
from acs_triton.operators import ACSConv, Conv2_5d, SoftACSConv


class Gate(nn.Module):
    """Squeeze and excitation, with the batch size written into it."""

    def __init__(self, channels, conv, pool):
        super().__init__()
        self.pool = pool(1)
        self.scale = conv(channels, channels, 1)

    def forward(self, x):
        batch, channels = x.shape[:2]
        gate = self.pool(x).view(batch, channels)
        gate = gate.view(batch, channels, *[1] * (x.dim() - 2))
        return x * torch.sigmoid(self.scale(gate))


class Network(nn.Module):
    """A U-shaped network with a head, in 2D or, written for 3D, in 3D."""

    def __init__(self, dims, conv):
        super().__init__()
        batch_norm, instance_norm = (getattr(nn, f"{name}Norm{dims}d") for name in ("Batch", "Instance"))
        max_pool, pool = getattr(nn, f"MaxPool{dims}d"), getattr(nn, f"AdaptiveAvgPool{dims}d")
        self.stem = conv(2, 8, 7, stride=2, padding=3)
        self.norm = batch_norm(8)
        self.down = max_pool(3, 2, 1)
        self.body = conv(8, 12, 3, padding=1, bias=False)
        self.group = nn.GroupNorm(3, 12)
        self.gate = Gate(12, conv, pool)
        self.mean = getattr(nn, f"AvgPool{dims}d")(2)
        self.coarse = conv(12, 8, 3, padding=2, dilation=2)
        self.instance = instance_norm(8, affine=True)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear" if dims == 2 else "trilinear")
        self.mix = conv(20, 5, 3, padding=1)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(5, 3)
        self.dims = dims

    def forward(self, x):
        batch = x.size(0)
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        skip = self.gate(self.group(self.body(self.down(x))))
        x = F.leaky_relu(self.instance(self.coarse(self.mean(skip))))
        x = self.mix(torch.cat([self.up(x), skip], dim=1))
        spatial = tuple(range(2, x.dim()))
        x = x + x.mean(spatial, keepdim=True) - x.amax(spatial, keepdim=True)
        pooled = F.adaptive_avg_pool2d(x, 1) if self.dims == 2 else x.mean(spatial)
        return x, self.head(self.drop(pooled.reshape(batch, -1)))


NATIVE = {
    "acs": ACSConv,
    "soft": SoftACSConv,
    "mean": lambda *args, **kwargs: SoftACSConv(*args, mean=True, **kwargs),
    "2.5d": Conv2_5d,
    "3d": nn.Conv3d,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_network_written_for_3d(kind, training):
    lifted = convert(Network(2, nn.Conv2d), kind).double().train(training)
    for name, parameter in lifted.named_parameters():
        if name.endswith("soft_w_core"):
            nn.init.normal_(parameter)
    native = Network(3, NATIVE[kind]).double().train(training)
    state = lifted.state_dict()
    if kind == "2.5d":
        state = {key: value.unsqueeze(2) if value.dim() == 4 else value for key, value in state.items()}
    native.load_state_dict(state, strict=True)
    volume = torch.randn(2, 2, 16, 24, 40, dtype=torch.float64, requires_grad=True)
    outputs = []
    for network in (lifted, native):
        maps, vectors = network(volume)
        gradients = torch.autograd.grad((maps.sin().sum() + vectors.cos().sum()), [volume, *network.parameters()])
        outputs.append((maps, vectors, *(gradient.flatten() for gradient in gradients)))
    assert outputs[0][0].shape == (2, 5, 4, 6, 10)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for (name, one), other in zip(lifted.named_buffers(), native.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_image_batches_run_as_in_2d(kind):
    network = Network(2, nn.Conv2d).double().eval()
    image = torch.randn(2, 2, 32, 48, dtype=torch.float64)
    expected = network(image)
    for one, other in zip(convert(network, kind)(image), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "segmentation.fcn_resnet50", "efficientnet-lite0"]
)
def test_equal_slices_give_the_2d_output(name):
    if name == "efficientnet-lite0":
        network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(name)
    else:
        models = pytest.importorskip("torchvision").models
        make, options = getattr(models, name.removeprefix("segmentation."), None), {"weights": None}
        if name.startswith("segmentation."):
            make, options = models.segmentation.fcn_resnet50, {"weights": None, "weights_backbone": None}
        network = make(**options)
    spread_out(network)
    assert check_lifting(network, torch.randn(2, 3, 64, 64), depth=32) < 1e-5


def spread_out(network):
    """Random statistics and scales: fresh ones (0 and 1) hide errors."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


# ---- single operations, against their 3D counterparts


def lifted_function(function, kind="acs"):
    class Layer(nn.Module):
        def forward(self, x):
            return function(x)

    return convert(Layer(), kind)


def assigned(x):
    shifted = torch.zeros_like(x)
    shifted[:, :2] = x[:, 2:]
    return shifted


def within_slices(x):
    tokens = x.transpose(1, 2)
    heads = tokens.reshape(x.shape[0], -1, 2, x.shape[1] // 2).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads)
    return mixed.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1]).transpose(1, 2).contiguous()


OPERATIONS = {
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool3d(x, 3, 2, 1)),
    "max pool, ceil": (lambda x: F.max_pool2d(x, 2, ceil_mode=True), lambda x: F.max_pool3d(x, 2, ceil_mode=True)),
    "average pool": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        lambda x: F.avg_pool3d(x, 3, 2, 1, count_include_pad=False),
    ),
    "unpool": (
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        lambda x: F.max_unpool3d(*F.max_pool3d(x, 2, return_indices=True), 2),
    ),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 3), lambda x: F.adaptive_avg_pool3d(x, 3)),
    "adaptive maximum": (lambda x: F.adaptive_max_pool2d(x, 1), lambda x: F.adaptive_max_pool3d(x, 1)),
    "global by its size": (lambda x: F.avg_pool2d(x, x.shape[2:]), lambda x: x.mean((2, 3, 4), keepdim=True)),
    "reflect": (
        lambda x: F.pad(x, (1, 2, 1, 2), "reflect"),
        lambda x: F.pad(x, (1, 2, 1, 2, 1, 2), "reflect"),
    ),
    "constant": (lambda x: F.pad(x, (2, 1, 2, 1), value=3.0), lambda x: F.pad(x, (2, 1, 2, 1, 2, 1), value=3.0)),
    "channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 2))),
    "bilinear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True),
    ),
    "nearest": (lambda x: F.interpolate(x, scale_factor=0.5), lambda x: F.interpolate(x, scale_factor=0.5)),
    "back to a size": (
        lambda x: F.interpolate(F.max_pool2d(x, 2), x.shape[2:], mode="bilinear"),
        lambda x: F.interpolate(F.max_pool3d(x, 2), x.shape[2:], mode="trilinear"),
    ),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), lambda x: x.mean((2, 3, 4), keepdim=True)),
    "mean, one axis after the other": (lambda x: x.mean(-1).mean(-1), lambda x: x.mean((2, 3, 4))),
    "mean of tokens": (lambda x: x.flatten(2).transpose(1, 2).mean(1), lambda x: x.mean((2, 3, 4))),
    "mean, channels last": (lambda x: x.permute(0, 2, 3, 1).mean((1, 2)), lambda x: x.mean((2, 3, 4))),
    "maximum": (lambda x: x.amax((2, 3)), lambda x: x.amax((2, 3, 4))),
    "deviation": (lambda x: x.std((2, 3)), lambda x: x.std((2, 3, 4))),
    "variance and mean": (
        lambda x: torch.cat(torch.var_mean(x, (2, 3), correction=0, keepdim=True), 1),
        lambda x: torch.cat(torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True), 1),
    ),
    "layer norm of channels": (
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 4, 1), x.shape[1:2]).permute(0, 4, 1, 2, 3),
    ),
    "channel shuffle": (
        lambda x: x.view(x.size(0), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
        lambda x: x.view(x.size(0), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    ),
    "sum into a new tensor": (lambda x: torch.zeros(x.shape, dtype=x.dtype).add_(x).mul_(2), lambda x: 2 * x),
    "assignment into a new tensor": (assigned, lambda x: torch.cat([x[:, 2:], x[:, :2] * 0], 1)),
    "gate of each channel": (
        lambda x: x * x.mean((2, 3)).view(x.shape[0], -1, 1, 1).relu_(),
        lambda x: x * x.mean((2, 3, 4), keepdim=True).relu(),
    ),
    "batch read before the depth changed": (
        lambda x: F.avg_pool2d(x, 2).reshape(x.shape[0], 2, 2, 5, 6).sum(2),
        lambda x: F.avg_pool3d(x, 2).unflatten(1, (2, 2)).sum(2),
    ),
    "attention within slices": (
        lambda x: within_slices(x.flatten(2)).view(x.shape),
        lambda x: within_slices(x.movedim(2, 1).flatten(0, 1).flatten(2)).view(2, 8, 4, 10, 12).movedim(1, 2),
    ),
    "softmax of channels": (lambda x: x.softmax(1), lambda x: x.softmax(1)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_its_3d_form(name):
    flat, solid = OPERATIONS[name]
    volume = torch.randn(2, 4, 8, 10, 12, dtype=torch.float64, requires_grad=True)
    found, expected = lifted_function(flat)(volume), solid(volume)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(expected)
    found, expected = (torch.autograd.grad(one, volume, probe)[0] for one in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"), [(2, 2, 0, 0), (4, 2, 1, 0), (3, 2, 1, 1), (3, 1, 1, 0)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(kind, kernel, stride, padding, extra, groups):
    layer = nn.ConvTranspose2d(4, 6, kernel, stride, padding, extra, groups).double()
    image = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = layer(image)
    lifted = convert(layer, kind)
    found = lifted(image.unsqueeze(2).expand(-1, -1, 7, -1, -1))
    solid = nn.ConvTranspose3d(4, 6, kernel, stride, padding, extra, groups).double()
    assert found.shape == solid(found.new_zeros(2, 4, 7, 5, 6)).shape
    if kind == "2.5d":
        torch.testing.assert_close(found, expected.unsqueeze(2).expand_as(found))
    if kind == "3d" and kernel % stride == 0 and padding == 0:
        torch.testing.assert_close(found, expected.unsqueeze(2).expand_as(found))
    if kind == "acs":  # the axial third repeats each slice
        torch.testing.assert_close(found[:, :2], expected[:, :2].unsqueeze(2).expand_as(found[:, :2]))
        assert found[:, 2:].abs().sum() > 0


def test_same_padding_is_computed_for_each_axis():
    """TensorFlow's rule depends on the size: odd and even axes are padded differently."""

    class Same(nn.Conv2d):
        def forward(self, x):
            pads = []
            for size in x.shape[:1:-1]:
                total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
                pads += [total // 2, total - total // 2]
            return F.conv2d(F.pad(x, pads), self.weight, self.bias, 2)

    layer = convert(Same(1, 3, 3, stride=2))
    assert layer(torch.randn(1, 1, 9, 12, 12)).shape == (1, 3, 5, 6, 6)
    assert layer(torch.randn(1, 1, 8, 13, 12)).shape == (1, 3, 4, 7, 6)


# ---- randomness belongs to volumes


def drop_path(x):
    """As timm has it."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.5)
    return x * mask.div_(0.5)


def drop_connect(x):
    """As EfficientNet has it."""
    mask = torch.floor(0.5 + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))
    return x / 0.5 * mask


def stochastic_depth(x):
    """As torchvision has it."""
    noise = torch.empty([x.shape[0]] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
    return x * noise.bernoulli_(0.5).div_(0.5)


@pytest.mark.parametrize("drop", [drop_path, drop_connect, stochastic_depth])
def test_drop_path_drops_whole_volumes(drop):
    result = lifted_function(drop)(torch.ones(64, 2, 5, 3, 3))
    each = result.flatten(1)
    assert (each == each[:, :1]).all()
    assert 10 < (each[:, 0] == 0).sum() < 54


def test_channel_dropout_drops_channels_of_whole_volumes():
    result = lifted_function(lambda x: F.dropout2d(x, 0.5))(torch.ones(16, 16, 5, 3, 3))
    each = result.flatten(2)
    assert (each == each[..., :1]).all()
    assert 64 < (each[..., 0] == 0).sum() < 192


def test_dropout_of_pooled_vectors_is_drawn_once_a_volume():
    pooled = lifted_function(lambda x: F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.5))
    result = pooled(torch.ones(32, 8, 6, 4, 4))
    assert set(result.flatten().tolist()) == {0.0, 2.0}


def test_dropout_of_feature_maps_is_drawn_for_each_voxel():
    result = lifted_function(lambda x: F.dropout(x, 0.5))(torch.ones(1, 1, 6, 8, 8))
    assert len({tuple(plane.flatten().tolist()) for plane in result[0, 0]}) == 6


# ---- options


def test_layer_rules_keep_the_depth_of_anisotropic_volumes():
    keep = {pattern: {"depth_stride": 1} for pattern in ("stem", "down", "mean")}
    network = convert(Network(2, nn.Conv2d), rules=keep)
    maps, _ = network(torch.randn(2, 2, 5, 32, 32))
    assert maps.shape == (2, 5, 5, 8, 8)
    assert network.down(torch.randn(1, 1, 5, 8, 8)).shape == (1, 1, 5, 4, 4)


def test_layer_rules_choose_kind_and_split():
    network = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)).double()
    convert(network, "acs", rules=lambda name, module: {"split": (6, 0, 0)} if name == "0" else None)
    volume = torch.randn(1, 1, 5, 6, 7, dtype=torch.float64)
    expected = F.conv3d(volume, network[0].weight.unsqueeze(2), network[0].bias, padding=(0, 1, 1))
    torch.testing.assert_close(network[0](volume), expected)
    convert(network, "acs", rules={"0": {"kind": "2.5d"}})
    torch.testing.assert_close(network[0](volume), expected)
    soft = convert(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3)), rules={"1": {"kind": "soft"}})
    assert [name for name, _ in soft.named_parameters() if "soft" in name] == ["1.soft_w_core"]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_first_convolution_takes_other_channels(channels):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    grey = torch.randn(2, 1, 8, 8)
    expected = network(grey.expand(-1, 3, -1, -1))
    convert(network, in_channels=channels)
    if channels == 1:  # a grey image as its RGB copy
        torch.testing.assert_close(network(grey), expected)
    else:
        rgb = state["0.weight"]
        repeated = torch.stack([rgb[:, index % 3] for index in range(channels)], 1) * 3 / channels
        torch.testing.assert_close(network[0].weight, repeated)
    assert network(torch.randn(1, channels, 6, 7, 8)).shape == (1, 4, 2, 3, 4)
    own = network[0].weight.detach().clone()
    nn.init.zeros_(network[0].weight)
    network.load_state_dict(state)
    torch.testing.assert_close(network[0].weight, own)


@pytest.mark.parametrize("inflation", ["repeat", "centre"])
@pytest.mark.parametrize("axis", [-3, -2, -1])
def test_inflated_kernels_hold_the_2d_ones(inflation, axis):
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    weight, image = layer.weight.detach().clone(), torch.randn(1, 2, 6, 7, dtype=torch.float64)
    expected = layer(image)
    convert(layer, "3d", inflation=inflation, axis=axis)
    assert layer.weight.shape == (3, 2, 3, 3, 3)
    torch.testing.assert_close(layer.weight.sum(axis), weight)
    torch.testing.assert_close(layer(image), expected)
    inside = layer(image.unsqueeze(axis).expand(*image.unsqueeze(axis).shape[: axis + 5], 5, *image.shape[axis + 5 :]))
    middle = inside.movedim(axis, 2)[:, :, 2]
    torch.testing.assert_close(middle, expected)


def test_planar_axis():
    layer = convert(nn.Conv2d(2, 3, 3, padding=1).double(), "2.5d", axis=-1)
    native = Conv2_5d(2, 3, 3, padding=1, unsqueeze_axis=-1).double()
    native.load_state_dict({"weight": layer.weight.unsqueeze(-1), "bias": layer.bias})
    volume = torch.randn(2, 2, 5, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(volume), native(volume))


# ---- the report


def test_check_lifting_finds_a_wrong_number():
    class Wrong(nn.Module):
        def forward(self, x):
            return x * (1 + 0.1 * (x.dim() == 4) * torch.is_grad_enabled() + 1e-3 * (x.shape[0] > 2))

    image = torch.randn(2, 3, 8, 8)
    assert check_lifting(Network(2, nn.Conv2d), torch.randn(2, 2, 32, 32)) < 1e-5
    assert check_lifting(Wrong(), image) > 1e-4
    with pytest.raises(ValueError, match="example_2d must be an image batch"):
        check_lifting(Wrong(), image[0])


def test_describe_lists_what_becomes_of_each_operation(capsys):
    network = Network(2, nn.Conv2d)
    description = describe(network, torch.randn(1, 2, 32, 64, 64))
    assert "max_pool3d" in capsys.readouterr().out
    names = [one.name for one in description.operations]
    assert names.count("conv2d") == 5
    stem = description.operations[0]
    assert (stem.layer, stem.input, stem.output) == (
        "stem",
        "(1, 2, 32, 64, 64) (N, C, D, H, W)",
        "(1, 8, 16, 32, 32) (N, C, D, H, W)",
    )
    assert stem.flops == 2 * 8 * 16 * 32 * 32 * 2 * 49
    assert description.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert description.refusal is None
    assert type(network) is Network


def test_describe_names_what_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), lifted_function(torch.fft.fft2))
    description = describe(network, torch.randn(1, 1, 4, 4, 4), show=False)
    assert "fft_fft2 in 1 (Layer)" in description.refusal
    assert str(description).count("refused: ") == 1


def test_describe_goes_on_after_a_refusal():
    flips, takes = (lifted_function(function) for function in (lambda x: x.flip(0), lambda x: x[:1]))
    network = nn.Sequential(flips, nn.Conv2d(1, 2, 3, padding=1), takes, nn.Conv2d(2, 2, 1))
    description = describe(network, torch.randn(1, 1, 4, 4, 4), show=False)
    assert [refusal.split(":")[0] for refusal in description.refusals] == [
        "cannot lift flip in 0 (Layer)",
        "cannot lift __getitem__ in 2 (Layer)",
    ]
    assert "conv2d" in [one.name for one in description.operations]


def test_norms_have_a_derivative_at_zero():
    volume = torch.zeros(1, 2, 3, 4, 5, requires_grad=True)
    lifted_function(lambda x: x * x.norm(p=2, dim=(2, 3), keepdim=True))(volume).sum().backward()
    assert volume.grad.isfinite().all()
    values = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64)
    for power in (1, 2, 3, float("inf")):
        found = lifted_function(lambda x, p=power: torch.linalg.vector_norm(x, p, (2, 3)))(values)
        expected = torch.linalg.vector_norm(values, power, (2, 3, 4)) / 3 ** (1 / power)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["acs", "2.5d", "3d"])
def test_pads_complete_an_upsampling(kind):
    """As in MedNeXt: a transposed convolution that falls one short, and a pad on one side."""

    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(2, 2, 3, 2, 1)

        def forward(self, x):
            return x + F.pad(self.up(self.down(x)), (1, 0, 1, 0))

    assert convert(Up(), kind)(torch.randn(1, 2, 8, 12, 16)).shape == (1, 2, 8, 12, 16)


@pytest.mark.parametrize("kind", ["3d", "acs"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients_of_kernels_that_span_the_volume(kind, transposed):
    """PyTorch 2.14's own are wrong there in float32 on CPUs, or damage memory."""
    gradients = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        conv = nn.ConvTranspose2d if transposed else nn.Conv2d
        layer = convert(conv(21, 21, 7, stride=2, padding=3, groups=21), kind).to(dtype)
        result = layer(torch.randn(2, 21, 4, 5, 6, dtype=torch.float64).to(dtype))
        result.backward(torch.randn(result.shape, dtype=torch.float64).to(dtype))
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-4, atol=1e-3)


def test_volumes_of_one_call_share_their_batch():
    class Both(nn.Module):
        def forward(self, x, y):
            return x + y

    both = convert(Both())
    assert both(torch.ones(2, 1, 3, 4, 5), y=torch.ones(2, 1, 3, 4, 5)).shape == (2, 1, 3, 4, 5)
    with pytest.raises(LiftingError, match="one batch size, got 2 and 3"):
        both(torch.ones(2, 1, 3, 4, 5), torch.ones(3, 1, 3, 4, 5))


def test_vectors_of_each_volume_condition_the_network():
    class Conditioned(nn.Module):
        def forward(self, x, t):
            return x * t[:, :, None, None]

    volume, scale = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2)
    torch.testing.assert_close(convert(Conditioned())(volume, scale), volume * scale[:, :, None, None, None])
