"""Small networks for the FeatureFlow tests, and the numbers they should give."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ffr_ext import FeatureFlow, ffr_loss


class Residual(nn.Module):
    """relu(x + bn(conv(x)))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm(self.conv(x)))


class ResidualNet(nn.Module):
    """A stem, residual blocks at two resolutions, and a classifier."""

    def __init__(self, blocks: int = 3, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.early = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.down = nn.MaxPool2d(2)
        self.late = nn.Sequential(*(Residual(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        return self.head(self.late(self.down(x)).mean((2, 3)))

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and block outputs without any hook: the truth the hooks are compared with."""
        features = []
        x = self.stem(x)
        for block in self.early:
            features.append(x := block(x))
        x = self.down(x)
        for block in self.late:
            features.append(x := block(x))
        return self.head(x.mean((2, 3))), features


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def task_loss(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def expected(model: Any, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Penalty and gradients of task loss + penalty, by calling ffr_loss on features returned by hand."""
    logits, features = model.features(x)
    penalty = ffr_loss(features, **options)
    return penalty.detach(), gradients(model, task_loss(logits) + penalty)


def assert_gradients_close(
    actual: list[Tensor | None], truth: list[Tensor | None], tolerance: float = 1e-6
) -> None:
    """Equal up to `tolerance` of the largest entry of all gradients.

    Some gradients are sums that cancel (of a bias before a batch norm, to 0), so their own size says nothing
    about their rounding errors.
    """
    assert len(actual) == len(truth)
    largest = max((t.abs().max().item() for t in truth if t is not None and t.numel()), default=0.0)
    for index, (a, b) in enumerate(zip(actual, truth, strict=True)):
        assert (a is None) == (b is None), f"parameter {index}: a gradient is missing"
        if a is not None and b is not None:
            torch.testing.assert_close(
                a,
                b,
                rtol=tolerance,
                atol=tolerance * max(largest, 1.0),
                msg=lambda m, i=index: f"parameter {i}: {m}",
            )


class Calls(nn.Module):
    """A module around a function of (its submodules, x), for odd forwards."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


class Layer(nn.Module):
    """relu(x + linear(x)): no batch statistics, so a batch is the sum of its samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.linear(x))


class Tower(nn.Module):
    """Classifies vectors; accumulation and data parallelism must give the gradients of the whole batch."""

    def __init__(self, depth: int = 4, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))

    @staticmethod
    def data(samples: int = 16, width: int = 8, classes: int = 3) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(samples, width, generator=generator), torch.arange(samples) % classes


def trained(model: nn.Module, steps: int, lr: float = 0.1, **options: Any) -> dict[str, Tensor]:
    """Weights after `steps` full-batch SGD steps on `Tower.data()` with FFR, in a plain loop."""
    x, y = Tower.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with FeatureFlow(model, **options) as flow:
        for _ in range(steps):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + flow.loss()).backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Checkpointed(ResidualNet):
    """Every block behind activation checkpointing."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.early:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        x = self.down(x)
        for block in self.late:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x.mean((2, 3)))


def make_flow(model: nn.Module, *args: Any, **options: Any) -> FeatureFlow:
    """The backend an install has for CPU tensors: with the native one gradients are made just in time."""
    return FeatureFlow(model, *args, **options)


def hooks(model: nn.Module) -> int:
    """How many forward hooks are on the model and its modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- passes by hand -------------------------------------------------------------------------------


@contextlib.contextmanager
def one_pass(flow: FeatureFlow, **options: Any) -> Iterator[None]:
    """begin_pass() ... end_pass(), in which nothing is to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.begin_pass(**options)
        yield
        flow.end_pass()


def views() -> tuple[Tensor, Tensor]:
    x, _ = Tower.data()
    return x, x[:7] + 0.3 * torch.randn(7, x.shape[1])


def outputs(layers: Any, x: Tensor) -> list[Tensor]:
    """What each of the layers makes of what the one before it made."""
    features = []
    for layer in layers:
        features.append(x := layer(x))
    return features


def penalty(model: Any, *inputs: Tensor, **options: Any) -> Tensor:
    """The sum of ffr_loss over the inputs, without any hook."""
    total = torch.zeros(())
    for x in inputs:
        total = total + ffr_loss(outputs(model.layers, x), **{"backend": "reference", **options})
    return total
