"""Backbones of SimSiam: torchvision's ResNets without their classifier, and a small ResNet for the demo."""

from typing import NamedTuple

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock


class Widths(NamedTuple):
    """Width of the features of a backbone, of the projector's hidden layers, and of z by default (--dim)."""

    features: int
    hidden: int
    dim: int


NETWORKS = {
    "resnet8": Widths(64, 256, 256),
    "resnet18": Widths(512, 2048, 2048),
    "resnet50": Widths(2048, 2048, 2048),
}
CIFAR_STEM_MAX_SIZE = 64  # pixels


def build_backbone(network: str, size: int) -> nn.Module:
    """Return a backbone: (B, 3, size, size) -> (B, features).

    The last batch norm of each residual block has initial scale zero (appendix A), except in resnet8. Up to 64 pixels
    the ResNets have the CIFAR stem: a 3x3 convolution with stride 1 and no max-pool (appendix D).
    """
    if network == "resnet8":
        return resnet8()
    backbone = getattr(models, network)(zero_init_residual=True)
    if size <= CIFAR_STEM_MAX_SIZE:
        backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    backbone.fc = nn.Identity()
    return backbone


def resnet8() -> nn.Module:
    """Return a small ResNet, (B, 3, S, S) -> (B, 64): a stride-2 stem and three basic blocks of width 16, 32 and 64.

    The last batch norm of each block is not zero-initialised: otherwise a run as short as the demo learns little.
    """

    def block(inputs: int, outputs: int, stride: int) -> BasicBlock:
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut)

    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [block(16, 16, 1), block(16, 32, 2), block(32, 64, 2)]
    network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():  # same initialisation as torchvision's ResNets
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
