"""The backbones of SimSiam: torchvision's ResNets without classifier, and a small one for the demo."""

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

NETWORKS = {
    "resnet8": (64, 256),
    "resnet18": (512, 2048),
    "resnet50": (2048, 2048),
}  # feature width, projector width
SMALL = 64  # pixels: up to here images live on the device, and a ResNet has the CIFAR stem


def build_backbone(network: str, size: int) -> nn.Module:
    """(B, 3, size, size) -> (B, width). A ResNet's blocks end in a batch norm that starts at zero (appendix A).

    Up to 64 pixels: 3x3 convolution with stride 1 and no max-pool as the stem (appendix D).
    """
    if network == "resnet8":
        return resnet8()
    backbone = getattr(models, network)(zero_init_residual=True)
    if size <= SMALL:
        backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    backbone.fc = nn.Identity()
    return backbone


def resnet8() -> nn.Module:
    """Three basic blocks, 16, 32 and 64 wide, behind a stride-2 stem: (B, 3, S, S) -> (B, 64).

    Its blocks start at full strength: from zero, runs as short as the demo's hardly leave the start.
    """

    def block(inputs: int, outputs: int, stride: int) -> BasicBlock:
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride, shortcut)

    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [block(16, 16, 1), block(16, 32, 2), block(32, 64, 2)]
    network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():  # as torchvision initialises its ResNets
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
