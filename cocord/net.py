"""Teacher and student networks for small images, and loading of teacher weights.

Every network maps images (B, 3, S, S) to (feature (B, width), logits (B, classes)); the feature is the input of the
last layer. Parameters and buffers have the names of RepDistiller's checkpoints, so those load directly. All networks
end in global average pooling. At S = 32 this equals RepDistiller's fixed windows of 8 and 4 pixels. S may also be a
larger multiple of 4.
"""

import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoints
from common.cli import fail
from common.weights import read_weights, recorded_accuracy

Output = tuple[Tensor, Tensor]  # feature (B, width), logits (B, classes)
PREFIXES = ("student.",)  # of parameter names in the authors' checkpoints
STATE_DICT_KEYS = ("s_model_dict",)  # top-level key of the state dict in the authors' checkpoints


def global_avg_pool(x: Tensor) -> Tensor:
    """Mean over height and width: (B, C, H, W) -> (B, C)."""
    return x.mean((2, 3))


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias, padded to keep the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def kaiming_init(network: nn.Module) -> None:
    """Draw the weights of all convolutions from normal(0, sqrt(2 / fan_out)) and set their biases to 0.

    fan_out = kernel height * kernel width * output channels, also for grouped convolutions (RepDistiller's rule).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, 0, (2 / (height * width * module.out_channels)) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------- resnet, 6n + 2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = convolution(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)).add_(shortcut), inplace=True)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2: three stages of n basic blocks.

    `widths` are the channels of the stem and of the three stages. `stride` is the stride of the stem and of stage 1.
    """

    def __init__(self, n: int, widths: tuple[int, int, int, int], classes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, widths[0], 3, stride), nn.BatchNorm2d(widths[0])
        for stage in (1, 2, 3):
            inputs, outputs = widths[stage - 1 : stage + 1]
            blocks = [BasicBlock(inputs, outputs, stride if stage == 1 else 2)]
            blocks += [BasicBlock(outputs, outputs, 1) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[3], classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feature = global_avg_pool(self.layer3(self.layer2(self.layer1(x))))
        return feature, self.fc(feature)


# ------------------------------------------------------------------------------------------------- wide resnet


class PreActBlock(nn.Module):
    """Pre-activation block: batch norm and ReLU come before each convolution.

    If the widths differ, the shortcut convolution also receives the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), convolution(outputs, outputs)
        self.convShortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True)) + shortcut


class Stage(nn.Module):
    """A sequence of n pre-activation blocks named `layer`, as in RepDistiller's checkpoints."""

    def __init__(self, n: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        blocks = [PreActBlock(inputs, outputs, stride)]
        blocks += [PreActBlock(outputs, outputs, 1) for _ in range(n - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Wide ResNet wrn_<depth>_<factor> with depth = 6n + 4, without dropout."""

    def __init__(self, n: int, factor: int, classes: int):
        super().__init__()
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        self.conv1 = convolution(3, 16)
        for stage in (1, 2, 3):
            setattr(self, f"block{stage}", Stage(n, widths[stage - 1], widths[stage], 1 if stage == 1 else 2))
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        kaiming_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Output:
        feature = global_avg_pool(F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))), inplace=True))
        return feature, self.fc(feature)


# ------------------------------------------------------------------------------------------------- vgg


class VGG(nn.Module):
    """Five blocks of convolutions (with bias) and batch norm; the first three are followed by max pooling.

    The last ReLU of a block is not in its Sequential, so that the layer indices match RepDistiller's checkpoints.
    """

    def __init__(self, convolutions: int, widths: tuple[int, ...], classes: int, stride: int = 1):
        super().__init__()
        inputs = 3
        for block, outputs in enumerate(widths):
            layers: list[nn.Module] = []
            for index in range(convolutions):
                is_stem = block == 0 and index == 0
                layers.append(nn.Conv2d(inputs, outputs, 3, stride if is_stem else 1, 1))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            setattr(self, f"block{block}", nn.Sequential(*layers[:-1]))
        self.blocks = len(widths)
        self.classifier = nn.Linear(inputs, classes)
        kaiming_init(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Output:
        for block in range(self.blocks):
            x = F.relu(getattr(self, f"block{block}")(x), inplace=True)
            if block < 3:
                x = F.max_pool2d(x, 2)
        feature = global_avg_pool(x)
        return feature, self.classifier(feature)


# ------------------------------------------------------------------------------------------------- mobilenet v2


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; residual connection if the shape does not change."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            convolution(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True),
            convolution(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True),
            convolution(hidden, outputs, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 with width factor 0.5, expansion 6 and ReLU. Images of 32 pixels are pooled from 2x2 positions."""

    # (expansion, width at factor 1, blocks, stride) of each stage
    LAYOUT = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = self._conv_bn_relu(3, 16, 3, 2)
        inputs, blocks = 16, []
        for expansion, width, repeats, stride in self.LAYOUT:
            layers = []
            for index in range(repeats):
                layers.append(InvertedResidual(inputs, width // 2, stride if index == 0 else 1, expansion))
                inputs = width // 2
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = self._conv_bn_relu(inputs, 1280, 1, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        kaiming_init(self)
        nn.init.normal_(self.classifier[0].weight, 0, 0.01)
        nn.init.zeros_(self.classifier[0].bias)

    @staticmethod
    def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            convolution(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Output:
        feature = global_avg_pool(self.conv2(self.blocks(self.conv1(x))))
        return feature, self.classifier(feature)


# ------------------------------------------------------------------------------------------------- shufflenets


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channel groups of x (B, C, H, W); the result has channels-last memory format.

    Channel c of group g becomes channel c * groups + g.
    """
    return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class ShuffleV1Block(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1.

    The residual is added at stride 1. At stride 2 it is average-pooled and concatenated.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        self.stride = stride
        self.groups = 1 if inputs == 24 else groups  # of the first convolution; 24 is the width of the stem
        width = outputs - inputs if stride == 2 else outputs
        hidden = width // 4
        self.conv1, self.bn1 = convolution(inputs, hidden, 1, 1, self.groups), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = convolution(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = convolution(hidden, width, 1, 1, groups), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True), self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return F.relu(out + x, inplace=True)
        return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1), inplace=True)


class ShuffleV1(nn.Module):
    """ShuffleNet V1 with 3 groups: a 1x1 stem of width 24, then 4, 8 and 4 blocks of width 240, 480 and 960."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 24, 1), nn.BatchNorm2d(24)
        inputs = 24
        for stage, (outputs, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            layers = [ShuffleV1Block(inputs, outputs, 2, 3)]
            layers += [ShuffleV1Block(outputs, outputs, 1, 3) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = outputs
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feature = global_avg_pool(self.layer3(self.layer2(self.layer1(x))))
        return feature, self.linear(feature)


class ShuffleV2Block(nn.Module):
    """Channel split: one half is unchanged, the other goes through 1x1, depthwise 3x3, 1x1; then channel shuffle."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = convolution(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = convolution(half, half, 3, 1, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = convolution(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        unchanged, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return channel_shuffle(torch.cat([unchanged, out], 1), 2)


class ShuffleV2DownBlock(nn.Module):
    """Downsampling by two branches of stride 2, then channel shuffle.

    Left: depthwise 3x3 and 1x1. Right: 1x1, depthwise 3x3 and 1x1.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = convolution(inputs, inputs, 3, 2, inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = convolution(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = convolution(inputs, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = convolution(half, half, 3, 2, half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = convolution(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))), inplace=True)
        return channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleV2(nn.Module):
    """ShuffleNet V2: a 1x1 stem of width 24, three stages of width 116, 232 and 464, a last 1x1 of width 1024.

    Each stage is a downsampling block followed by 3, 7 and 3 blocks.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 24, 1), nn.BatchNorm2d(24)
        inputs = 24
        for stage, (outputs, blocks) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            layers: list[nn.Module] = [ShuffleV2DownBlock(inputs, outputs)]
            layers += [ShuffleV2Block(outputs) for _ in range(blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = outputs
        self.conv2, self.bn2 = convolution(inputs, 1024, 1), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        feature = global_avg_pool(F.relu(self.bn2(self.conv2(x)), inplace=True))
        return feature, self.linear(feature)


# ------------------------------------------------------------------------------------------------- resnet 18 and 50


class LargeBasicBlock(nn.Module):
    """Like `BasicBlock`, with the parameter names of the larger ResNets."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width), nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a residual connection; the last 1x1 has 4 * width channels."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)).add_(self.shortcut(x)), inplace=True)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a 1x1 convolution with batch norm, or the identity (an empty Sequential) if the shape does not change."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class LargeResNet(nn.Module):
    """ResNet-18 or -50 for CIFAR: a 3x3 stem of width 64 without max pooling, then four stages."""

    def __init__(self, block: type[LargeBasicBlock] | type[Bottleneck], blocks: tuple[int, ...], classes: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 64), nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate(blocks, 1):
            width = 32 * 2**stage
            layers: list[nn.Module] = []
            for index in range(count):
                layers.append(block(inputs, width, 2 if stage > 1 and index == 0 else 1))
                inputs = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feature = global_avg_pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return feature, self.linear(feature)


# ------------------------------------------------------------------------------------------------- all networks

NETWORKS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {  # name: (feature width, classes -> network)
    **{f"resnet{6 * n + 2}": (64, partial(ResNet, n, (16, 16, 32, 64))) for n in (1, 2, 3, 5, 7, 9, 18)},
    "resnet8x4": (256, partial(ResNet, 1, (32, 64, 128, 256))),
    "resnet32x4": (256, partial(ResNet, 5, (32, 64, 128, 256))),
    "wrn_16_1": (64, partial(WideResNet, 2, 1)),
    "wrn_16_2": (128, partial(WideResNet, 2, 2)),
    "wrn_40_1": (64, partial(WideResNet, 6, 1)),
    "wrn_40_2": (128, partial(WideResNet, 6, 2)),
    "vgg8": (512, partial(VGG, 1, (64, 128, 256, 512, 512))),
    "vgg13": (512, partial(VGG, 2, (64, 128, 256, 512, 512))),
    "MobileNetV2": (1280, MobileNetV2),
    "ShuffleV1": (960, ShuffleV1),
    "ShuffleV2": (1024, ShuffleV2),
    "ResNet18": (512, partial(LargeResNet, LargeBasicBlock, (2, 2, 2, 2))),
    "ResNet50": (2048, partial(LargeResNet, Bottleneck, (3, 4, 6, 3))),
    # networks of the demo: stem of stride 2, few channels
    "vgg_s": (32, partial(VGG, 1, (8, 16, 24, 24, 32), stride=2)),
    "resnet_s32": (32, partial(ResNet, 1, (16, 32, 64, 32), stride=2)),
    "resnet_s64": (64, partial(ResNet, 1, (16, 32, 64, 64), stride=2)),
    "vgg_s32": (32, partial(VGG, 1, (24, 32, 48, 48, 32), stride=2)),
    "vgg_s64": (64, partial(VGG, 1, (24, 32, 48, 64, 64), stride=2)),
}
EXPECTED_ACCURACY = {  # top-1 in percent of RepDistiller's single runs on CIFAR-100
    "resnet20": 69.06, "resnet32": 71.14, "resnet56": 72.34, "resnet110": 74.31, "resnet8x4": 72.50,
    "resnet32x4": 79.42, "wrn_16_2": 73.26, "wrn_40_1": 71.98, "wrn_40_2": 75.61, "vgg8": 70.36, "vgg13": 74.64,
    "MobileNetV2": 64.60, "ShuffleV1": 70.50, "ShuffleV2": 71.82, "ResNet50": 79.34,
}  # fmt: skip


def build(name: str, classes: int) -> nn.Module:
    """Return the network `name` with random initial weights."""
    return NETWORKS[name][1](classes)


def feature_width(name: str) -> int:
    """Number of channels of the network's feature."""
    return NETWORKS[name][0]


def default_lr(name: str) -> float:
    """Learning rate of RepDistiller for the network `name`."""
    return 0.01 if name in ("MobileNetV2", "ShuffleV1", "ShuffleV2") else 0.05


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution before it, in place; return the network.

    For inference only: the network must be in eval mode. Its outputs stay equal up to rounding. A frozen teacher then
    dispatches a third fewer operations.
    """
    for module in network.modules():
        children = dict(module.named_children())
        if isinstance(module, nn.Sequential):
            pairs = list(itertools.pairwise(children))
        elif isinstance(module, PreActBlock):  # bn1 comes before its convolution, so it cannot be folded
            pairs = [("conv1", "bn2")]
        elif isinstance(module, WideResNet):  # conv1 is not followed by bn1
            pairs = []
        else:
            pairs = [(name, name.replace("conv", "bn")) for name in children if name.startswith("conv")]
        for conv_name, norm_name in pairs:
            conv, norm = children.get(conv_name), children.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return network


def weights_to_bfloat16(network: nn.Module) -> None:
    """Convert convolutions and linear layers of a frozen network to bfloat16, in place.

    Under autocast the outputs are bit-identical. Autocast caches its weight casts for trained weights only, so it
    would convert the weights of a frozen network again in every step.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------- teacher weights


def load(
    name: str, classes: int, path: Path, data_digest: str | None = None, held_out: bool = False
) -> tuple[nn.Module, float | None]:
    """Return the network `name` with the weights from `path`, and the accuracy recorded there in percent or None.

    `path` is the folder of a run of teacher.py, or a checkpoint file of RepDistiller or of the authors' code. Exits
    with code 2 if the file does not exist, cannot be read, comes from a diverged run or does not fit the network, or if
    teacher.py trained it on data with another digest than `data_digest`. With `held_out`, warns if the file does not
    say on which data the teacher was trained.
    """
    path = path / "model.pt" if path.is_dir() else path
    if not path.exists():
        fail(
            f"--weights {path} does not exist: train the teacher with make cocord-teachers (output in "
            f"runs/SCALE/cocord/) or cocord/teacher.py --network {name}, or give another path"
        )
    weights = read_weights(path, "--weights", f"the weights of a {name}", STATE_DICT_KEYS, PREFIXES)
    if weights.other.get("diverged"):
        fail(f"--weights {path}: the training of this teacher diverged: train it again with a smaller --lr")
    trained_with = weights.other.get("arguments")  # only in files of teacher.py
    if data_digest and isinstance(trained_with, Mapping) and weights.other.get("data") != data_digest:
        fail(
            f"--weights {path}: this teacher was trained on other data (--data-set {trained_with.get('data_set')} "
            f"--data-seed {trained_with.get('data_seed')}{' --held-out' * bool(trained_with.get('held_out'))}): train "
            "one with the --data-set, --data-seed, --held-out and --data of this run"
        )
    if held_out and not isinstance(trained_with, Mapping):
        teacher = f"the teacher of --weights {path} may have been trained on the held-out images"
        print(f"warning: --held-out: {teacher}, which makes the accuracies too high", file=sys.stderr)
    state, accuracy = weights.tensors, recorded_accuracy(weights, "--weights", path)
    network = build(name, classes)
    initial = network.state_dict()
    for key, value in initial.items():
        if key.endswith("num_batches_tracked"):  # absent in old files
            state.setdefault(key, value)
    for suffix in ("weight", "bias"):  # the authors' code names MobileNetV2's last layer `classifier`
        if f"classifier.0.{suffix}" in initial and f"classifier.{suffix}" in state:
            state[f"classifier.0.{suffix}"] = state.pop(f"classifier.{suffix}")
    checkpoints.load_weights(network, state, f"--weights {path}", f"{name} with {classes} classes")
    return network, accuracy
