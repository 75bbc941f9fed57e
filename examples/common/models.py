"""The networks of the examples: CIFAR ResNets (He et al. 2016, section 4.2), VGG-16 with batch norm, LeNet-5."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ffr_ext import FeatureFlow

VGG16_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pooling


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: strided sample, zero-padded
    channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        inner = self.norm2(self.conv2(inner))
        if self.stride != 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(inner + x)


class ResNet(nn.Module):
    """ResNet of depth 6 n + 2 for small images: three stages of n blocks."""

    def __init__(
        self, depth: int, classes: int, channels: int = 3, widths: tuple[int, int, int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: expected 6 n + 2 (8, 14, 20, 32, 44, 56, 110, ...), got {depth}")
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        inputs, stages = widths[0], []
        for stage, outputs in enumerate(widths):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(ResidualBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        return self.head(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG-16 with batch norm and one linear layer. Pooling rounds up, so that 8x8 images work too."""

    def __init__(self, classes: int, channels: int = 3, widths: tuple[int, ...] = VGG16_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            if width:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class LeNet5(nn.Module):
    """The LeNet-5 of the pruning literature, 20-50-500, for MNIST's 28x28 pixels: 431,080 parameters for ten classes.

    Weights after He et al. 2015, biases from N(0, 0.01), as in the published code of nonconvex sparse group lasso. With
    ``norm``, which is ours, a batch norm behind each layer but the last: methods that act on scales need one.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 1,
        widths: tuple[int, int, int] = (20, 50, 500),
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 5)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5)
        self.fc1 = nn.Linear(16 * widths[1], widths[2])
        self.fc2 = nn.Linear(widths[2], classes)
        initialise(self)
        for module in self.children():
            nn.init.normal_(module.bias, std=0.01)
        self.norm1 = nn.BatchNorm2d(widths[0]) if norm else nn.Identity()
        self.norm2 = nn.BatchNorm2d(widths[1]) if norm else nn.Identity()
        self.norm3 = nn.BatchNorm1d(widths[2]) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.norm3(self.fc1(x.flatten(1)))))


def initialise(model: nn.Module) -> None:
    """He et al. 2015, as for the published CIFAR ResNets."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": lambda **options: ResNet(8, **options),
    "resnet20": lambda **options: ResNet(20, **options),
    "resnet56": lambda **options: ResNet(56, **options),
    "resnet110": lambda **options: ResNet(110, **options),
    "vgg16_bn": lambda **options: VGG(**options),
    "lenet5": lambda **options: LeNet5(**options),
    "lenet5_bn": lambda **options: LeNet5(norm=True, **options),
}


def build(name: str, classes: int, channels: int) -> nn.Module:
    """A network by name, freshly initialised."""
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](classes=classes, channels=channels)


def flow_layers(model: nn.Module) -> list[str]:
    """The points of the feature flow: stem and residual blocks of a ResNet, all activations of a VGG, both
    convolutions of a LeNet-5 (their shapes differ: one term, with ``transition="pool"``).

    Not the activations inside residual blocks: with weights that suit the block outputs, penalising those
    as well kills the network.
    """
    if isinstance(model, ResNet):
        return [
            "stem",
            *(name for name, module in model.named_modules() if isinstance(module, ResidualBlock)),
        ]
    if isinstance(model, LeNet5):
        return ["norm1", "norm2"]
    return FeatureFlow(model).layers
