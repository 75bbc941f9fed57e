"""FFRCallback with penalties of weights: their gradient once per optimizer step, and a step after it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from regularizers import Ridge
from torch import Tensor, nn

pytest.importorskip("lightning", reason="needs ffr-ext[lightning]")

import lightning
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_models import GAN, WEIGHTS, Net, WithLBFGS, assert_same, batches, fit

from ffr_ext import FeatureFlow
from ffr_ext.trainers import FFRCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")


class Automatic(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def plainly(
    module: Any, clip: float = 0.0, accumulate: int = 1, threshold: float = 0.0, flow: bool = False
) -> Any:
    """The same in a plain loop, the penalty as a part of the loss."""
    twin = copy.deepcopy(module)
    optimizer, ridge = twin.configure_optimizers(), Ridge(twin.net, threshold=threshold)
    for index, (x, y) in enumerate(batches(4 // accumulate)):
        answer, penalty = twin.net.run(x)
        loss = nn.functional.cross_entropy(answer, y) + ridge.loss() + (penalty if flow else 0.0)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(twin.parameters(), clip)
            optimizer.step()
            ridge.step()
            optimizer.zero_grad()
    return twin


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1], ids=["not clipped", "clipped"])
def test_steps_are_those_of_a_plain_loop_with_the_penalty_in_the_loss(clip: float, accumulate: int) -> None:
    module = Automatic()
    truth = plainly(module, clip, accumulate, threshold=0.05)
    ridge = Ridge(module.net, threshold=0.05)
    fit(
        module,
        FFRCallback(regularizers=ridge),
        batch=4 // accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
    )
    assert (ridge.added, ridge.stepped) == (2, 2)
    assert_same(module, truth)


def test_it_goes_together_with_a_flow() -> None:
    module = Automatic()
    truth = plainly(module, flow=True)
    both = [lambda model: FeatureFlow(model.net, **WEIGHTS), lambda model: Ridge(model.net)]
    trainer = fit(module, FFRCallback(regularizers=both), log_every_n_steps=1)
    assert_same(module, truth)
    logged = set(trainer.callback_metrics)
    assert {"ffr/penalty", "ffr/factor", "ffr/length/0", "ffr/curvature/0", "ffr/Ridge/stem.weight"} <= logged


def test_a_gradient_scaler_does_not_scale_it() -> None:
    module = Automatic()
    module.net.float()
    truth = copy.deepcopy(module)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Zero(Automatic):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return 0.0 * self.net(batch[0].float()).mean()

    zero = Zero()
    zero.net = module.net
    fit(zero, FFRCallback(regularizers=Ridge(module.net)), plugins=[precision])
    for actual, start in zip(module.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(actual, start * 0.9**2)


def test_an_optimizer_that_does_not_step_is_followed_by_nothing() -> None:
    module = Automatic()
    ridge = Ridge(module.net)
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Overflow(Automatic):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch[0].float()).mean() * float("inf")

    overflow = Overflow()
    overflow.net = module.net.float()
    fit(overflow, FFRCallback(regularizers=ridge), plugins=[precision])
    assert ridge.stepped == 0


def test_it_follows_the_optimizer_of_its_own_network() -> None:
    module = GAN("discriminator first")
    truth = copy.deepcopy(module)
    opt_g, opt_d = truth.configure_optimizers()
    ridge = Ridge(truth.d)

    def backward(loss: Tensor, **kwargs: Any) -> None:
        discriminator = not any(p.grad is not None for p in truth.d.parameters())
        loss = loss + ridge.loss() if discriminator else loss
        loss.backward(**kwargs)

    for real, _ in batches():
        opt_d.zero_grad()
        truth.play(real, opt_g, opt_d, backward, lambda net, x: (net(x), 0.0))
    ridge = Ridge(module.d)
    fit(module, FFRCallback(regularizers=ridge))
    assert (ridge.added, ridge.stepped) == (2, 2)
    assert_same(module, truth)


def test_parameters_of_two_optimizers_are_refused_before_training() -> None:
    module = GAN("discriminator first")
    start = copy.deepcopy(module)
    with pytest.raises(ValueError, match="Ridge: its parameters belong to 2 optimizers"):
        fit(module, FFRCallback(regularizers=Ridge))
    assert_same(module, start)


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_call_of_a_closure_has_it(line_search: str | None, automatic: bool) -> None:
    module = WithLBFGS(line_search, automatic)
    truth = copy.deepcopy(module)
    optimizer, ridge = truth.configure_optimizers(), Ridge(truth.net)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(truth.net(x), y) + ridge.loss()
            loss.backward()
            return loss

        optimizer.step(closure)
    fit(module, FFRCallback(regularizers=Ridge))
    assert_same(module, truth)


def test_its_state_and_its_schedule_survive_a_checkpoint(tmp_path: Path) -> None:
    def callback() -> FFRCallback:
        return FFRCallback(regularizers=Ridge, schedule={"ramp": 4, "shape": "cosine"})

    start = Automatic()
    whole, first, second = (copy.deepcopy(start) for _ in range(3))
    fit(whole, callback(), max_epochs=2)
    changed = callback()
    trainer = fit(first, changed)
    changed.regularizers[0].weight = 0.25  # type: ignore[attr-defined]
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = callback()
    fit(second, resumed, max_epochs=2, ckpt_path=tmp_path / "run.ckpt")
    assert resumed.regularizers[0].weight == 0.25  # type: ignore[attr-defined]
    assert resumed.regularizers[0].scale == whole_scale(4)


def whole_scale(steps: int) -> float:
    from ffr_ext.schedules import WeightSchedule

    return WeightSchedule(Ridge(nn.Linear(1, 1)), ramp=4, shape="cosine").factor_at(steps - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularizers": 3}, r"regularizers\[0\]: expected a regularizer, or a function"),
        ({"regularizers": [Ridge, nn.Linear(2, 2).weight]}, r"regularizers\[1\]: .* got Parameter"),
        ({"regularizers": Ridge, "gradient": 1.0}, "regularizers: expected them alone"),
        ({"regularizers": Ridge, "layers": ["a"]}, "regularizers: expected them alone"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FFRCallback(**options)


def test_a_function_that_makes_none_is_refused_before_training() -> None:
    with pytest.raises(TypeError, match=r"regularizers\[0\]: expected a function .* returned NoneType"):
        fit(Automatic(), FFRCallback(regularizers=lambda model: None))
