"""Networks and Lightning modules for the trainer tests, each with the plain loop that its steps must equal."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import torch
from flow_models import outputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ffr_ext import ffr_loss

WEIGHTS: dict[str, Any] = {"gradient": 2.0, "curvature": 1.0}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    def __init__(self, inputs: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, 6), nn.Linear(6, outputs)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The answer and the penalty, without any hook."""
        features = outputs(self.blocks, self.stem(x))
        return self.head(features[-1]), ffr_loss(features, backend="reference", **WEIGHTS)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def batches(size: int = 4) -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return list(zip(x.split(size), y.split(size), strict=True))


def fit(module: Any, *callbacks: Any, batch: int = 4, ckpt_path: Any = None, **options: Any) -> Any:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch), ckpt_path=ckpt_path, weights_only=False)
    return trainer


def assert_same(actual: nn.Module, truth: nn.Module) -> None:
    for (name, a), b in zip(actual.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


class GAN(lightning.LightningModule):
    """`order`: how the two networks take their steps. `pen`: penalties added by hand, for a plain loop."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.g, self.d, self.order, self.automatic_optimization = Net(2, 4), Net(4, 1), order, False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.g, self.d)]

    def training_step(self, batch: Any, index: int) -> None:
        self.play(batch[0], *self.optimizers(), self.manual_backward, lambda net, x: (net(x), 0.0))

    def play(self, real: Tensor, opt_g: Any, opt_d: Any, backward: Any, call: Any) -> None:
        """One step; `call(net, x)` gives the answer and the penalty to be added by hand."""
        z = torch.ones(4, 2, dtype=torch.float64) * real[:, :2]
        shared, penalty_of_shared = call(self.g, z) if self.order.startswith("one fake") else (None, 0.0)

        def discriminator() -> None:
            self.g.requires_grad_(self.order != "frozen in turn")
            opt_d.zero_grad()
            fake = self.g(z) if shared is None else shared
            if self.order != "one fake, differentiated twice":
                fake = fake.detach()
            (a, p), (b, q) = call(self.d, fake), call(self.d, real)
            loss = a.mean() - b.mean() + self.weigh("d", p + q)
            backward(loss, retain_graph=self.order == "one fake, differentiated twice")
            opt_d.step()

        def generator() -> None:
            self.g.requires_grad_()
            self.d.requires_grad_(self.order != "frozen in turn")
            opt_g.zero_grad()
            fake, penalty = call(self.g, z) if shared is None else (shared, penalty_of_shared)
            answer, p = call(self.d, fake)
            backward(-answer.mean() + self.weigh("g", penalty) + self.weigh("d", p))
            opt_g.step()
            self.d.requires_grad_()

        if self.order == "generator first":
            generator()
            discriminator()
        else:
            discriminator()
            generator()

    penalised = ""

    def weigh(self, net: str, penalty: Any) -> Any:
        return penalty if net in self.penalised else 0.0

    def plainly(self, penalised: str) -> GAN:
        """A copy trained in a plain loop, with the penalties of these networks."""
        twin = copy.deepcopy(self)
        twin.penalised = penalised
        opt_g, opt_d = twin.configure_optimizers()
        for real, _ in batches():
            twin.play(
                real, opt_g, opt_d, lambda loss, **kwargs: loss.backward(**kwargs), lambda net, x: net.run(x)
            )
        return twin


class WithLBFGS(lightning.LightningModule):
    def __init__(self, line_search: str | None, automatic: bool) -> None:
        super().__init__()
        self.net, self.line_search, self.automatic_optimization = Net(), line_search, automatic

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn=self.line_search)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def plainly(self) -> WithLBFGS:
        twin = copy.deepcopy(self)
        optimizer = twin.configure_optimizers()
        for x, y in batches():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                answer, penalty = twin.net.run(x)
                loss = nn.functional.cross_entropy(answer, y) + penalty
                loss.backward()
                return loss

            optimizer.step(closure)
        return twin
