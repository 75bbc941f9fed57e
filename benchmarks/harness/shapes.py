"""The feature shapes that the benchmarks measure, each with the reason why it is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]  # of one feature, without the batch


@dataclass(frozen=True)
class Setting:
    """The features of one network: `runs` of (how many features, shape without batch), in depth order."""

    name: str
    runs: tuple[tuple[int, Shape], ...]
    batch: int  # on a CPU
    gpu_batch: int
    reason: str
    gpu_only: bool = False

    def shapes(self, batch: int) -> list[Shape]:
        """Shape of every feature."""
        return [(batch, *shape) for count, shape in self.runs for _ in range(count)]

    def batch_on(self, device: torch.device | str) -> int:
        return self.gpu_batch if torch.device(device).type == "cuda" else self.batch

    def elements(self, batch: int) -> int:
        return sum(math.prod(s) for s in self.shapes(batch))


def cifar_resnet(depth: int) -> tuple[tuple[int, Shape], ...]:
    """Stem and residual blocks of the CIFAR ResNet of 6k + 2 layers: 16, 32, 64 channels at 32, 16, 8
    pixels.
    """
    k = (depth - 2) // 6
    return (k + 1, (16, 32, 32)), (k, (32, 16, 16)), (k, (64, 8, 8))


VGG16 = tuple(
    (count, (channels, size, size))
    for count, channels, size in ((2, 64, 32), (2, 128, 16), (3, 256, 8), (3, 512, 4), (3, 512, 2))
)
RESNET50 = ((3, (256, 56, 56)), (4, (512, 28, 28)), (6, (1024, 14, 14)), (3, (2048, 7, 7)))

SETTINGS = {
    s.name: s
    for s in (
        Setting("tiny2", ((2, (16, 8, 8)),), 4, 4, "the least a call can be: one difference, pure overhead"),
        Setting("tiny3", ((3, (16, 8, 8)),), 4, 4, "one curvature term, pure overhead"),
        Setting(
            "tiny9", ((3, (16, 8, 8)), (3, (32, 4, 4)), (3, (64, 2, 2))), 4, 4, "ResNet-20 on 8x8 digits"
        ),
        Setting("resnet20", cifar_resnet(20), 32, 128, "the papers' smallest network on CIFAR"),
        Setting(
            "resnet56", cifar_resnet(56), 32, 128, "the papers' main network on CIFAR; the goals are set here"
        ),
        Setting("resnet110", cifar_resnet(110), 32, 128, "deep: launch and list overheads grow with it"),
        Setting("vgg16", VGG16, 32, 128, "stages of 2 and 3 features, from wide to 2x2 pixels"),
        Setting("resnet50", RESNET50, 4, 256, "ImageNet: large features, few of them"),
        Setting(
            "vit_b", ((12, (197, 768)),), 8, 64, "a transformer's residual stream: one long stage, odd length"
        ),
        Setting("deep", cifar_resnet(1202), 1, 16, "ResNet-1202: 601 features, small at this batch"),
        Setting(
            "above_llc", ((8, (64, 64, 64)),), 32, 512, "268 MB in fp32: far larger than a last-level cache"
        ),
        Setting(
            "above_2g",
            ((3, (1024, 1024)),),
            1040,
            1040,
            "a feature of more than 2^31 bytes in bf16",
            gpu_only=True,
        ),
    )
}


def make_features(
    shapes: Sequence[Shape],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
    seed: int = 0,
    requires_grad: bool = True,
) -> list[Tensor]:
    """Standard normal values after a ReLU, as features are: half of them are zeros, so that ties occur."""
    generator = torch.Generator(device).manual_seed(seed)
    change = LAYOUTS[layout]
    features = []
    for shape in shapes:
        # In float32, and rounded: normal_ knows no half precision on every device.
        x = torch.randn(shape, generator=generator, device=device).relu_().to(dtype)
        features.append(change(x).requires_grad_(requires_grad))
    return features


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda x: x, "channels_last": _channels_last}


def shrink(setting: Setting) -> Setting:
    """The same stages with few features of few elements, for smoke tests."""
    runs = tuple((min(count, 3), tuple(min(s, 4) for s in shape)) for count, shape in setting.runs)
    return Setting(setting.name, runs, 2, 2, setting.reason)
