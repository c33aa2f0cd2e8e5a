"""The networks of CoCoRD's pairs for small pictures, small ones for the demo, and the reader of published weights.

Every network maps (B, 3, S, S) to its feature (B, width), the input of its last layer, and its logits (B, classes).
Names of parameters and buffers are those of RepDistiller's released teachers, which therefore load as they are. All
pool adaptively: equal to the fixed windows of 8 and 4 pixels at 32 pixels, and any larger multiple of 4 will do.
"""

import itertools
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import checkpoints
from common.cli import fail
from common.files import DamagedFile

Output = tuple[Tensor, Tensor]  # feature (B, width), logits (B, classes)
PREFIXES = ("module.student.", "module.")  # of parameters that were saved inside other modules
WRAPPERS = ("model", "s_model_dict", "state_dict")  # keys under which others keep the weights in a checkpoint


def pooled(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C): the mean over the picture."""
    return x.mean((2, 3))


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def kaiming(module: nn.Module) -> None:
    """Every convolution as normal(0, sqrt(2 / (k k outputs))), which is Kaiming's rule for fan-out."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            height, across = part.kernel_size
            nn.init.normal_(part.weight, 0, (2 / (height * across * part.out_channels)) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# ------------------------------------------------------------------------------------------------- resnet, 6n + 2


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

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
    """Three stages of n basic blocks; `widths` are those of the stem and of the stages, `stride` that of both first."""

    def __init__(self, n: int, widths: tuple[int, int, int, int], classes: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, widths[0], 3, stride), nn.BatchNorm2d(widths[0])
        for stage in (1, 2, 3):
            inputs, outputs = widths[stage - 1 : stage + 1]
            blocks = [Basic(inputs, outputs, stride if stage == 1 else 2)]
            blocks += [Basic(outputs, outputs, 1) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[3], classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feature = pooled(self.layer3(self.layer2(self.layer1(x))))
        return feature, self.fc(feature)


# ------------------------------------------------------------------------------------------------- wide resnet


class PreActivated(nn.Module):
    """Batch norm and ReLU before each convolution; where the widths differ the shortcut, too, sees them applied."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), convolution(outputs, outputs)
        self.convShortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True)) + shortcut


class Stage(nn.Module):
    """Blocks under the name `layer`."""

    def __init__(self, n: int, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(
            PreActivated(inputs, outputs, stride), *[PreActivated(outputs, outputs, 1) for _ in range(n - 1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """wrn_<depth>_<factor>, depth = 6n + 4; without dropout."""

    def __init__(self, n: int, factor: int, classes: int):
        super().__init__()
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        self.conv1 = convolution(3, 16)
        for number in (1, 2, 3):
            setattr(self, f"block{number}", Stage(n, widths[number - 1], widths[number], 1 if number == 1 else 2))
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        kaiming(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Output:
        feature = pooled(F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))), inplace=True))
        return feature, self.fc(feature)


# ------------------------------------------------------------------------------------------------- vgg


class VGG(nn.Module):
    """Five blocks of biased convolutions with batch norm; the first three end in a max-pool.

    A block's last ReLU is not in its Sequential, so the numbers in the names are the published ones.
    """

    def __init__(self, convolutions: int, widths: tuple[int, ...], classes: int, stride: int = 1):
        super().__init__()
        inputs = 3
        for number, outputs in enumerate(widths):
            parts: list[nn.Module] = []
            for place in range(convolutions):
                first = number == place == 0
                parts += [nn.Conv2d(inputs, outputs, 3, stride if first else 1, 1), nn.BatchNorm2d(outputs)]
                parts += [nn.ReLU(inplace=True)]
                inputs = outputs
            setattr(self, f"block{number}", nn.Sequential(*parts[:-1]))
        self.blocks = len(widths)
        self.classifier = nn.Linear(inputs, classes)
        kaiming(self)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Output:
        for number in range(self.blocks):
            x = F.relu(getattr(self, f"block{number}")(x), inplace=True)
            x = F.max_pool2d(x, 2) if number < 3 else x
        feature = pooled(x)
        return feature, self.classifier(feature)


# ------------------------------------------------------------------------------------------------- mobilenet v2


class Inverted(nn.Module):
    """1x1 up, depthwise 3x3, 1x1 down without ReLU; a shortcut where input and output have one shape."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        inner = inputs * expansion
        self.conv = nn.Sequential(
            convolution(inputs, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(inplace=True),
            convolution(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner), nn.ReLU(inplace=True),
            convolution(inner, outputs, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Width 0.5, expansion 6, ReLU; 2x2 positions are left of 32 pixels before pooling."""

    LAYOUT = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = self._unit(3, 16, 3, 2)
        inputs, blocks = 16, []
        for expansion, width, repeats, stride in self.LAYOUT:
            layers = []
            for place in range(repeats):
                layers.append(Inverted(inputs, width // 2, stride if place == 0 else 1, expansion))
                inputs = width // 2
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = self._unit(inputs, 1280, 1, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, classes))
        kaiming(self)
        nn.init.normal_(self.classifier[0].weight, 0, 0.01)
        nn.init.zeros_(self.classifier[0].bias)

    @staticmethod
    def _unit(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            convolution(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Output:
        feature = pooled(self.conv2(self.blocks(self.conv1(x))))
        return feature, self.classifier(feature)


# ------------------------------------------------------------------------------------------------- shufflenets


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel c of group g becomes channel c * groups + g, (B, C, H, W). The result is channels-last."""
    return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class ShuffledV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; at stride 2 the shortcut is pooled and put beside."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        made = outputs - inputs if stride == 2 else outputs
        inner, self.stride = made // 4, stride
        self.groups = 1 if inputs == 24 else groups
        self.conv1, self.bn1 = convolution(inputs, inner, 1, 1, self.groups), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = convolution(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = convolution(inner, made, 1, 1, groups), nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        new = shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True), self.groups)
        new = F.relu(self.bn2(self.conv2(new)), inplace=True)
        new = self.bn3(self.conv3(new))
        if self.stride == 1:
            return F.relu(new + x, inplace=True)
        return F.relu(torch.cat([new, F.avg_pool2d(x, 3, 2, 1)], 1), inplace=True)


class ShuffleV1(nn.Module):
    """Three groups; stages of 4, 8 and 4 blocks, 240, 480 and 960 wide, behind a 1x1 stem of 24."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 24, 1), nn.BatchNorm2d(24)
        inputs = 24
        for stage, (outputs, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            layers = [ShuffledV1(inputs, outputs, 2, 3)]
            layers += [ShuffledV1(outputs, outputs, 1, 3) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = outputs
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feature = pooled(self.layer3(self.layer2(self.layer1(x))))
        return feature, self.linear(feature)


class ShuffledV2(nn.Module):
    """Half of the channels pass, the other half goes through 1x1, depthwise 3x3, 1x1; then both are shuffled."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = convolution(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = convolution(half, half, 3, 1, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = convolution(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, new = x.chunk(2, 1)
        new = F.relu(self.bn1(self.conv1(new)), inplace=True)
        new = self.bn2(self.conv2(new))
        new = F.relu(self.bn3(self.conv3(new)), inplace=True)
        return shuffle(torch.cat([kept, new], 1), 2)


class DownV2(nn.Module):
    """Both halves are made anew at stride 2: depthwise 3x3 and 1x1; 1x1, depthwise 3x3 and 1x1."""

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
        return shuffle(torch.cat([left, right], 1), 2)


class ShuffleV2(nn.Module):
    """Stages of 1 + 3, 1 + 7 and 1 + 3 blocks, 116, 232 and 464 wide, a 1x1 stem of 24, a last 1x1 to 1024."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 24, 1), nn.BatchNorm2d(24)
        inputs = 24
        for stage, (outputs, blocks) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            layers = [DownV2(inputs, outputs), *[ShuffledV2(outputs) for _ in range(blocks)]]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            inputs = outputs
        self.conv2, self.bn2 = convolution(inputs, 1024, 1), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        feature = pooled(F.relu(self.bn2(self.conv2(x)), inplace=True))
        return feature, self.linear(feature)


# ------------------------------------------------------------------------------------------------- resnet 18 and 50


class Plain(nn.Module):
    """As `Basic`, under the names of the larger ResNets."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width), nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        new = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(new)).add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1, the last four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        new = F.relu(self.bn1(self.conv1(x)), inplace=True)
        new = F.relu(self.bn2(self.conv2(new)), inplace=True)
        return F.relu(self.bn3(self.conv3(new)).add_(self.shortcut(x)), inplace=True)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Empty, hence the identity, where the shape does not change."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class LargeResNet(nn.Module):
    """Four stages behind a 3x3 stem of 64 without max-pool."""

    def __init__(self, block: type[Plain] | type[Bottleneck], blocks: tuple[int, ...], classes: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(3, 64), nn.BatchNorm2d(64)
        inputs = 64
        for stage, count in enumerate(blocks, 1):
            width, layers = 32 * 2**stage, []
            for place in range(count):
                layers.append(block(inputs, width, 2 if stage > 1 and place == 0 else 1))
                inputs = width * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Output:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feature = pooled(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return feature, self.linear(feature)


# ------------------------------------------------------------------------------------------------- by name

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
    "ResNet18": (512, partial(LargeResNet, Plain, (2, 2, 2, 2))),
    "ResNet50": (2048, partial(LargeResNet, Bottleneck, (3, 4, 6, 3))),
    # The demo's: a stem of stride 2, few channels.
    "vgg_s": (32, partial(VGG, 1, (8, 16, 24, 24, 32), stride=2)),
    "resnet_s32": (32, partial(ResNet, 1, (16, 32, 64, 32), stride=2)),
    "resnet_s64": (64, partial(ResNet, 1, (16, 32, 64, 64), stride=2)),
    "vgg_s32": (32, partial(VGG, 1, (24, 32, 48, 48, 32), stride=2)),
    "vgg_s64": (64, partial(VGG, 1, (24, 32, 48, 64, 64), stride=2)),
}
MOBILE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # trained at a fifth of the others' learning rate
EXPECTED = {  # top-1 of RepDistiller's single runs on CIFAR-100, percent
    "resnet20": 69.06, "resnet32": 71.14, "resnet56": 72.34, "resnet110": 74.31, "resnet8x4": 72.50,
    "resnet32x4": 79.42, "wrn_16_2": 73.26, "wrn_40_1": 71.98, "wrn_40_2": 75.61, "vgg8": 70.36, "vgg13": 74.64,
    "MobileNetV2": 64.60, "ShuffleV1": 70.50, "ShuffleV2": 71.82, "ResNet50": 79.34,
}  # fmt: skip


def build(name: str, classes: int) -> nn.Module:
    """The network `name`, freshly initialised."""
    return NETWORKS[name][1](classes)


def width(name: str) -> int:
    """Channels of the feature."""
    return NETWORKS[name][0]


def fold(network: nn.Module) -> nn.Module:
    """A network in eval mode, with every batch norm that follows a convolution of its own block folded into it.

    Equal up to rounding, in place, and for inference alone: a frozen teacher then dispatches a third fewer operations.
    """
    for module in network.modules():
        parts = dict(module.named_children())
        follows = [(name, name.replace("conv", "bn")) for name in parts if name.startswith("conv")]
        if isinstance(module, nn.Sequential):
            names = list(parts)
            follows = list(itertools.pairwise(names))
        elif isinstance(module, PreActivated | WideResNet):  # here a batch norm comes before its convolution
            follows = [("conv1", "bn2")] if isinstance(module, PreActivated) else []
        for first, second in follows:
            one, other = parts.get(first), parts.get(second)
            if isinstance(one, nn.Conv2d) and isinstance(other, nn.BatchNorm2d):
                setattr(module, first, nn.utils.fuse_conv_bn_eval(one, other))
                setattr(module, second, nn.Identity())
    return network


def round_weights(network: nn.Module) -> None:
    """Keep the weights of convolutions and linear layers in bfloat16, in place; for a frozen network.

    Equal in every bit to what autocast makes of them. It would do so at every step: it caches the casts of trained
    weights alone.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------- published weights


def read_weights(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """(weights, the accuracy that stands beside them if one does) of a run of teacher.py or a published checkpoint.

    Weights may stand bare or under WRAPPERS, their names behind PREFIXES; tensors come to the CPU, and nothing from
    the file is executed. Stops (exit 2) where there is nothing of the kind.
    """
    path = path / "model.pt" if path.is_dir() else path
    try:
        old = path.exists() and not zipfile.is_zipfile(path)  # the format of before torch 1.6 has no checksums
        found = torch.load(path, map_location="cpu", weights_only=True) if old else checkpoints.load(path)
    except FileNotFoundError:
        fail(
            f"{path}: no such weights; make cocord-teachers (into runs/SCALE/cocord/) or cocord/teacher.py "
            "--network NAME makes them, --weights names them"
        )
    except DamagedFile as error:
        fail(f"{error}; a file that holds more than tensors and numbers (RepDistiller's *_last.pth) is never loaded")
    except Exception as error:  # torch raises many kinds for a cut or hostile file
        fail(f"{path} cannot be read ({type(error).__name__}); a file that holds more than tensors and numbers "
             "(RepDistiller's *_last.pth) is never loaded")  # fmt: skip
    accuracy = found.get("accuracy") if isinstance(found, dict) else None
    if isinstance(found, dict) and found.get("diverged"):
        fail(f"{path}: the training of this teacher diverged; train another, with a smaller --lr")
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not any(isinstance(one, Tensor) for one in found.values()):
        fail(f"{path} holds no weights, neither bare nor under {', '.join(WRAPPERS)}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name[len(prefix) :]: tensor for name, tensor in found.items()}
    return found, None if accuracy is None else float(accuracy)


def load(name: str, classes: int, path: Path) -> tuple[nn.Module, float | None]:
    """The network `name` with the weights of `path`, and their recorded accuracy. Stops (exit 2) where they misfit."""
    state, accuracy = read_weights(path)
    network = build(name, classes)
    own = network.state_dict()
    for missing in [one for one in own if one.endswith("num_batches_tracked") and one not in state]:
        state[missing] = own[missing]  # old files lack it
    for part in ("weight", "bias"):  # CoCoRD's authors name MobileNetV2's last layer without the 0
        if f"classifier.0.{part}" in own and f"classifier.{part}" in state:
            state[f"classifier.0.{part}"] = state.pop(f"classifier.{part}")
    checkpoints.fit(network, state, path)
    return network, accuracy
