"""PyTorch Lightning: one callback, and the user's module stays as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # the older distribution of the same code
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from ..flow.feature_flow import FeatureFlow
from ..flow.layers import LayerSpec
from ..schedules import WeightSchedule


class FFRCallback(Callback):
    """Add the feature-flow penalty to the loss of every training step.

    ::

        trainer = lightning.Trainer(callbacks=[FFRCallback(gradient=3.0, curvature=3.0)])

    What the module runs between the start of the training batch and its backward pass is recorded: use
    ``self(x)``, ``self.net(x)`` or functions in ``training_step`` as you like. Several calls, of two views
    for instance, are several paths, whose penalties are added; calls in eval mode or without autograd, of a
    teacher for instance, are left out (:meth:`ffr_ext.FeatureFlow.begin_pass` says what a call is). The
    penalty is added to the loss right before the backward pass, under gradient accumulation as a mean over
    the micro-batches, under a ``GradScaler`` scaled like the loss. Under manual optimisation it joins the
    first backward pass of each batch.

    Logs ``ffr/penalty`` and ``ffr/factor``, and ``ffr/length/<term>`` and ``ffr/curvature/<term>`` every
    ``trainer.log_every_n_steps`` steps; the terms of several calls are counted through.

    Args:
        layers: see :class:`ffr_ext.FeatureFlow`; names are relative to ``module``.
        module: the submodule to look for layers in, by its name in the LightningModule; default the whole
        of it.
        schedule: keywords of :class:`ffr_ext.schedules.WeightSchedule`, in optimiser steps.
        log: whether to log.
        options: keywords of :class:`ffr_ext.FeatureFlow`.

    Attributes:
        flow: the :class:`ffr_ext.FeatureFlow`, from the start of ``fit`` on.
    """

    def __init__(
        self,
        layers: LayerSpec = "auto",
        *,
        module: str = "",
        schedule: dict[str, Any] | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.module = module
        self.schedule_options = dict(schedule or {})
        self.log = log
        self.options = options
        self.flow: FeatureFlow | None = None
        self.schedule: WeightSchedule | None = None
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After ``configure_model`` has made the layers, before anything is run or traced by
        ``torch.compile``."""
        target: nn.Module = pl_module.get_submodule(self.module) if self.module else pl_module
        self.flow = FeatureFlow(target, self.layers, **self.options).attach()
        self.schedule = WeightSchedule(self.flow, **self.schedule_options)
        self.schedule.set(self._steps)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the pass."""
        flow, schedule = self._ready()
        schedule.set(trainer.global_step)
        self._steps = trainer.global_step
        # A strategy that wraps the module calls the step through the module's forward.
        step_in_forward = flow.model is pl_module and trainer.model is not pl_module
        flow.begin_pass(within_forward=step_in_forward)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Close the pass and add the penalty to the loss, which autograd sees as one in-place addition."""
        flow, schedule = self._ready()
        if not flow.in_pass:
            return  # a second backward pass of a batch under manual optimisation, or the weights are 0
        flow.end_pass()
        penalty = flow.loss()
        share = penalty / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss.add_((share if scaler is None else scaler.scale(share)).to(loss))
        if self.log:
            self._log(trainer, pl_module, penalty.detach(), schedule.factor)

    def _log(self, trainer: Trainer, pl_module: LightningModule, penalty: Tensor, factor: float) -> None:
        pl_module.log("ffr/penalty", penalty)
        pl_module.log("ffr/factor", factor)
        if (trainer.global_step + 1) % _log_interval(trainer) == 0:
            assert self.flow is not None
            terms = self.flow.terms()
            for kind, values in (("length", terms.gradient), ("curvature", terms.curvature)):
                pl_module.log_dict({f"ffr/{kind}/{index}": value for index, value in enumerate(values)})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        if self.flow is not None:
            self.flow.detach()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser steps taken, so that a resumed run continues its schedule."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = int(state_dict["steps"])
        if self.schedule is not None:
            self.schedule.set(self._steps)

    def _ready(self) -> tuple[FeatureFlow, WeightSchedule]:
        if self.flow is None or self.schedule is None:
            raise RuntimeError(
                "FFRCallback: on_fit_start() has not run; pass the callback to the Trainer's callbacks="
            )
        return self.flow, self.schedule


def _log_interval(trainer: Trainer) -> int:
    return max(int(getattr(trainer, "log_every_n_steps", 1)), 1)  # an attribute without a declaration
