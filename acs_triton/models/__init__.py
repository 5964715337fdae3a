"""Networks for volumes: a U-Net over any 2D encoder, and ACSConv's networks under their names.

The modules are ACSConv's too: ``acs_triton.models.resnet.FCNResNet`` is ``acsconv.models.resnet.FCNResNet``.
"""

from .acsunet import ACSUNet
from .convnext import ConvNeXt, convnext_base, convnext_large, convnext_small, convnext_tiny, convnext_xlarge
from .densenet import ClsDenseNet, DenseNet, FCNDenseNet, densenet121, densenet161, densenet169, densenet201
from .pyramid import Pyramid
from .resnet import ClsResNet, FCNResNet, ResNet, resnet18, resnet34, resnet50, resnet101, resnet152
from .unet import LiftedUNet
from .vgg import FCNVGG, VGG, ClsVGG, VGG16_bn, vgg11, vgg13, vgg16, vgg19

__all__ = [
    "FCNVGG",
    "VGG",
    "ACSUNet",
    "ClsDenseNet",
    "ClsResNet",
    "ClsVGG",
    "ConvNeXt",
    "DenseNet",
    "FCNDenseNet",
    "FCNResNet",
    "LiftedUNet",
    "Pyramid",
    "ResNet",
    "VGG16_bn",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "convnext_xlarge",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]
