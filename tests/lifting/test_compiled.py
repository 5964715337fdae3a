"""Networks with what Dynamo treats in ways of its own: compiled they give what they give eagerly."""

import pytest
import torch

from acs_triton import convert

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

NETWORKS = {
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),  # in-place hardswish
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),  # chunk
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5),  # pad, roll
    "test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "test_byobnet": lambda: timm.create_model("test_byobnet", num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_equals_eager(name):
    torch.manual_seed(0)
    model = convert(NETWORKS[name]()).eval()
    volume = torch.randn(1, 3, 32, 64, 48)
    with torch.no_grad():
        expected = model(volume)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(volume), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_timms_gradient_checkpoints(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=3, drop_rate=0.0, drop_path_rate=0.0)
        network.set_grad_checkpointing(checkpointing)
        model = convert(network)
        model(torch.randn(2, 3, 32, 64, 64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
