"""Networks of the field, lifted: the exact oracle for each, and training steps for some.

Needs the ``models`` extra (torchvision, timm, segmentation-models-pytorch, MONAI); what is not
installed is skipped. Weights are random, with scales and statistics spread out.
"""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from acs_triton.lifting import check_lifting, convert

TORCHVISION = """
    alexnet vgg11_bn resnet50 resnext50_32x4d densenet121 googlenet inception_v3 mobilenet_v3_small mnasnet0_5
    shufflenet_v2_x0_5 squeezenet1_1 efficientnet_v2_s regnet_y_400mf convnext_tiny swin_t swin_v2_t
    segmentation.deeplabv3_mobilenet_v3_large segmentation.lraspp_mobilenet_v3_large
"""
TIMM = """
    resnet26d res2net50_26w_4s regnety_004 seresnet50 ecaresnet26t skresnet18 resnest14d densenet121 inception_v4
    xception41 mobilenetv2_100 mobilenetv4_conv_small tf_efficientnet_b0 mixnet_s convnextv2_atto nfnet_l0
    resnetv2_50x1_bit hrnet_w18_small dla34 dpn68 ghostnet_100 mobilevit_xxs repvgg_a0 cspdarknet53 rexnet_100
    edgenext_xx_small poolformer_s12 pvt_v2_b0 hgnetv2_b0 efficientvit_b0 inception_next_atto test_vit
"""
DECODERS = """
    Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus UPerNet Segformer
"""
ENCODERS = """
    vgg11_bn se_resnet50 efficientnet-b0 mobilenet_v2 mit_b0 mobileone_s0 tu-hrnet_w18_small
"""
MONAI = {
    "UNet": (2, 1, 2, (4, 8, 16), (2, 2)),
    "BasicUNet": (2, 1, 2, (4, 4, 8, 8, 16, 4)),
    "SegResNet": (2, 8, 1, 2),
    "DynUNet": (2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]),
    "AttentionUnet": (2, 1, 2, (4, 8, 16), (2, 2)),
    "AutoEncoder": (2, 1, 1, (4, 8), (2, 2)),
    "VNet": (2, 1, 2),
    "HighResNet": (2, 1, 2),
}
SIZES = {"inception_v3": 96, "inception_v4": 96, "alexnet": 96, "HighResNet": 24, "test_vit": 160}
PLANE = 64


def make(family, name):
    """The network, and the channels and plane size of its images."""
    torch.manual_seed(0)
    size = SIZES.get(name, PLANE)
    if family == "torchvision":
        models = pytest.importorskip("torchvision").models
        options = {"weights": None}
        if name in ("googlenet", "inception_v3"):
            options.update(init_weights=False, aux_logits=False)
        if name.startswith("segmentation."):
            models, options["weights_backbone"] = models.segmentation, None
        return getattr(models, name.removeprefix("segmentation."))(**options), 3, size
    if family == "timm":
        return pytest.importorskip("timm").create_model(name, pretrained=False), 3, size
    if family == "monai":
        return getattr(pytest.importorskip("monai.networks.nets"), name)(*MONAI[name]), 1, size
    smp = pytest.importorskip("segmentation_models_pytorch")
    decoder, encoder = name.split("-", 1)
    return getattr(smp, decoder)(encoder, encoder_weights=None), 3, size


def spread_out(network):
    """Fresh scales and statistics (0 and 1) hide errors."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 and "norm" not in name and (parameter == 0).all():
            nn.init.normal_(parameter, std=0.1)
    return network


ORACLE = [
    *(("torchvision", name) for name in TORCHVISION.split()),
    *(("timm", name) for name in TIMM.split()),
    *(("smp", f"{decoder}-resnet18") for decoder in DECODERS.split()),
    *(("smp", f"Unet-{encoder}") for encoder in ENCODERS.split()),
    *(("monai", name) for name in MONAI),
]


@pytest.mark.parametrize(("family", "name"), ORACLE)
def test_equal_slices_give_the_2d_output(family, name):
    network, channels, size = make(family, name)
    image = torch.randn(1, channels, size, size)
    assert check_lifting(spread_out(network), image, depth=min(size, 32)) < 1e-5


TRAINED = [
    ("torchvision", "mobilenet_v3_small"),
    ("torchvision", "segmentation.lraspp_mobilenet_v3_large"),
    ("timm", "tf_efficientnet_b0"),
    ("timm", "convnextv2_atto"),
    ("monai", "DynUNet"),
]


@pytest.mark.parametrize("kind", ["acs", "soft", "mean", "2.5d", "3d"])
@pytest.mark.parametrize(("family", "name"), TRAINED)
def test_trains_on_volumes_of_unequal_sides(family, name, kind):
    network, channels, _ = make(family, name)
    network.train()
    used_in_2d = used_parameters(network, torch.randn(2, channels, 64, 64))
    convert(network, kind)
    used = used_parameters(network, torch.randn(2, channels, 32, 64, 32))
    assert used >= used_in_2d


def used_parameters(network, data):
    """Names of the parameters that a training step gives a finite gradient."""
    network.zero_grad()
    outputs = [leaf for leaf in tree_leaves(network(data)) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    assert all(output.shape[0] == data.shape[0] for output in outputs)
    sum(output.square().mean() for output in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    return set(gradients)
