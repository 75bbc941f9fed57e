"""The networks whose training step is measured. They collect their features in a list where they are asked
to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: 3x3, 3x3 or, with a bottleneck, 1x1, 3x3, 1x1 (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        if width == outputs:
            sizes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        else:
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, padding=k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(F.relu(y) if index else y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and stages of blocks. Features: the outputs of the blocks, and the stem's with
    `stem_is_feature`.
    """

    def __init__(
        self,
        stem: nn.Module,
        channels: int,
        stages: Sequence[tuple[int, int, int, int]],  # (blocks, width, outputs, stride of the first)
        classes: int,
        stem_is_feature: bool,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList()
        for count, width, outputs, stride in stages:
            for index in range(count):
                self.blocks.append(Block(channels, width, outputs, 1 if index else stride))
                channels = outputs
        self.head = nn.Linear(channels, classes)
        self.stem_is_feature = stem_is_feature

    @property
    def flow_layers(self) -> list[str]:
        """What `FeatureFlow` captures to see the same features."""
        return [
            *(["stem"] if self.stem_is_feature else []),
            *(f"blocks.{i}" for i in range(len(self.blocks))),
        ]

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        x = self.stem(x)
        collected = [x] if self.stem_is_feature else []
        for block in self.blocks:
            x = block(x)
            if features is not None:
                collected.append(x)
        if features is not None:
            features += collected
        return self.head(x.mean((2, 3)))


def cifar_resnet(depth: int) -> ResNet:
    """For 32x32 images: 6 k + 2 layers in three stages of 16, 32 and 64 channels."""
    k = (depth - 2) // 6
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return ResNet(stem, 16, [(k, 16, 16, 1), (k, 32, 32, 2), (k, 64, 64, 2)], 10, stem_is_feature=True)


def resnet50() -> ResNet:
    """For 224x224 images."""
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    stages = [(3, 64, 256, 1), (4, 128, 512, 2), (6, 256, 1024, 2), (3, 512, 2048, 2)]
    return ResNet(stem, 64, stages, 1000, stem_is_feature=False)


class Attention(nn.Module):
    """A pre-norm transformer block (Vaswani et al. 2017, with the norm first)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) with the mean over tokens. Features: the outputs of the blocks."""

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    @property
    def flow_layers(self) -> list[str]:
        """What `FeatureFlow` captures to see the same features."""
        return [f"blocks.{i}" for i in range(len(self.blocks))]

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
            if features is not None:
                features.append(x)
        return self.head(self.norm(x).mean(1))


Network = ResNet | ViT


def vit_tiny() -> ViT:
    """For 32x32 images: 12 blocks of width 192 with 3 heads on 64 tokens."""
    return ViT(32, 4, 192, 12, 3, 10)


def images(batch: int, size: int, classes: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Random images and labels: what they show makes no difference to the time."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn((batch, 3, size, size), generator=generator, device=device)
    return x, torch.randint(classes, (batch,), generator=generator, device=device)
