"""Hugging Face transformers: a thin Trainer, and the mixin it is made of for trainers of your own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..flow.feature_flow import FeatureFlow
from ..flow.layers import LayerSpec
from ..regularizers.base import Regularizer
from ..schedules import WeightSchedule
from .common import Spec, flows, made, named_terms, specs


class FFRTrainerMixin:
    """Adds the feature-flow penalty, or other regularizers, to the training steps of any ``transformers.Trainer``; put
    it in front of yours.

    ::

        class MyTrainer(FFRTrainerMixin, Seq2SeqTrainer): ...

    The penalty joins the loss in ``compute_loss``: that of every call of the model in there which the loss depends on.
    (Calls in eval mode or under ``no_grad``, of a reference model for instance, are left out.) A penalty of weights
    adds its gradient once per optimizer step, before gradients are clipped, and its ``step()`` follows the optimizer's.

    Args:
        ffr_layers: ``layers`` of :class:`ffr_ext.FeatureFlow`; ``"auto"`` finds the transformer layers.
        ffr_options: keywords of :class:`ffr_ext.FeatureFlow`, such as ``{"gradient": 1.0, "curvature": 1.0}``.
        ffr_regularizers: one or several, instead of a FeatureFlow with these layers and options: regularizers, or
            functions of the model that make one.
        ffr_schedule: keywords of :class:`ffr_ext.schedules.WeightSchedule`, in optimizer steps. The step is the
            trainer's ``state.global_step``, which its checkpoints hold, so a resumed run continues the schedule.

    Under gradient accumulation the penalty is the mean over the micro-batches, also where the Trainer
    leaves the loss of the model undivided because that is normalised by ``num_items_in_batch``. Logs get
    ``ffr_factor``, and while that is not 0 ``ffr_penalty``, ``ffr_length_<term>`` and ``ffr_curvature_<term>``; terms
    of other regularizers are ``ffr_<class>_<term>``. The logged ``loss`` contains the penalty of features.

    Attributes:
        regularizers: their hooks are on the model while ``train()`` runs.
        flow: the first :class:`ffr_ext.FeatureFlow` among them.

    Raises:
        TypeError: ``ffr_regularizers`` together with ``ffr_layers`` or ``ffr_options``, or something that is none.
        ValueError: a penalty of weights under DeepSpeed, or one of another model than the trainer's.
    """

    def __init__(
        self,
        *args: Any,
        ffr_layers: LayerSpec = "auto",
        ffr_options: dict[str, Any] | None = None,
        ffr_regularizers: Spec | Iterable[Spec] | None = None,
        ffr_schedule: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if ffr_regularizers is not None and (ffr_options or ffr_layers != "auto"):
            raise TypeError(
                "ffr_regularizers: expected them alone, got ffr_layers or ffr_options too; pass "
                "lambda model: FeatureFlow(model, ...) among the regularizers"
            )
        trainer: Any = self
        self._ffr = (ffr_layers, ffr_options or {}, specs(ffr_regularizers), ffr_schedule or {})
        self._watch(trainer.model)
        self._penalty: Tensor | None = None
        trainer.add_callback(_AfterOptimizerStep(self))

    def _watch(self, model: Any) -> None:
        layers, options, given, schedule = self._ffr
        self._watched = model
        self.regularizers: list[Regularizer] = (
            made(given, model) if given else [FeatureFlow(model, layers, **options)]
        )
        for regularizer in self.regularizers:
            if regularizer.model not in set(model.modules()):
                raise ValueError(
                    f"ffr_regularizers: {type(regularizer).__name__} is of another model than the trainer's; pass a "
                    "function (model) -> regularizer"
                )
        self.schedule = WeightSchedule(self.regularizers, **schedule)

    @property
    def flow(self) -> Any:
        """The first FeatureFlow; None if there is none."""
        return next(iter(flows(self.regularizers)), None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train`` with the hooks on the model, from before it is wrapped or compiled until the
        end."""
        trainer: Any = self
        of_weights = [type(each).__name__ for each in self.regularizers if not each.joins_loss]
        if of_weights and getattr(trainer, "is_deepspeed_enabled", False):
            raise ValueError(
                f"ffr_regularizers: {of_weights[0]} adds to the parameters' gradients, which DeepSpeed keeps to itself"
            )
        for regularizer in self.regularizers:
            regularizer.attach()
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            for regularizer in self.regularizers:
                regularizer.detach()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The step of the wrapped Trainer; after the last micro-batch, the gradients of penalties of weights."""
        trainer: Any = self
        self._follow()
        of_weights = [
            each for each in self.regularizers if not isinstance(each, FeatureFlow) and each.enabled
        ]
        for regularizer in of_weights:
            regularizer.before_forward()
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            for regularizer in of_weights:
                regularizer.after_backward()
        if trainer.accelerator.sync_gradients:
            scaler = getattr(trainer.accelerator, "scaler", None)
            factor = (
                1.0 if scaler is None else scaler.get_scale()
            )  # gradients are unscaled when they are clipped
            for regularizer in of_weights:
                if not regularizer.joins_loss:
                    regularizer.scale, scale = regularizer.scale * factor, regularizer.scale
                    regularizer.add_gradients_()
                    regularizer.scale = scale
        return loss

    def _follow(self) -> None:
        """Watch the model that `model_init` has made when train() started, and set the schedule."""
        trainer: Any = self
        if trainer.model is not self._watched:
            for regularizer in self.regularizers:
                regularizer.detach()
            self._watch(trainer.model)
            for regularizer in self.regularizers:
                regularizer.attach()
        self.schedule.set(trainer.state.global_step)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the wrapped Trainer plus the penalties of features, in training only."""
        trainer: Any = self
        self._follow()
        if not (model.training and torch.is_grad_enabled()):
            active: list[Regularizer] = []
        else:
            active = [each for each in self.regularizers if each.joins_loss and each.enabled and _on(each)]
        for flow in flows(active):
            flow.begin_pass()
        try:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
            loss = result[0] if return_outputs else result
            penalties = [_penalty_of(each, loss) for each in active]
        finally:
            for flow in flows(active):
                flow.after_backward()
        found = [penalty for penalty in penalties if penalty is not None]
        self._penalty = None
        if found:
            penalty = torch.stack([each.to(found[0]) for each in found]).sum()
            self._penalty = penalty.detach()
            if self._loss_is_whole(num_items_in_batch):
                penalty = penalty / _accumulation(trainer)
            loss = loss + penalty.to(loss)
        return (loss, *result[1:]) if return_outputs else loss

    def _loss_is_whole(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer will not divide the loss by the number of accumulated micro-batches (its own
        rule)."""
        trainer: Any = self
        stated = getattr(trainer, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        normalised = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(normalised or trainer.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the penalty and its terms to training logs; reading them off the device is left to logging
        steps."""
        if "loss" in logs:
            logs["ffr_factor"] = self.schedule.factor
            if self._penalty is not None:
                logs["ffr_penalty"] = self._penalty.item()
            for regularizer in self.regularizers:
                if isinstance(regularizer, FeatureFlow) and self._penalty is None:
                    continue
                own = "ffr" if regularizer is self.flow else f"ffr_{type(regularizer).__name__}"
                terms = named_terms(regularizer)
                logs.update(
                    {f"{own}_{name.replace('/', '_')}": float(value) for name, value in terms.items()}
                )
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _AfterOptimizerStep(TrainerCallback):
    """Lets the regularizers' `step` follow the optimizer's, where that was not left out for overflow."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(self.trainer.accelerator, "optimizer_step_was_skipped", False):
            return
        for regularizer in self.trainer.regularizers:
            if regularizer.enabled:
                regularizer.step()


def _penalty_of(regularizer: Regularizer, loss: Tensor) -> Tensor | None:
    return regularizer.loss_for(loss) if isinstance(regularizer, FeatureFlow) else regularizer.loss()


def _on(regularizer: Regularizer) -> bool:
    return regularizer.attached if isinstance(regularizer, FeatureFlow) else True


def _accumulation(trainer: Any) -> int:
    """Micro-batches in the running accumulation; the last one of an epoch may be shorter."""
    return int(
        getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    )


class FFRTrainer(FFRTrainerMixin, Trainer):
    """``transformers.Trainer`` with the feature-flow penalty, see :class:`FFRTrainerMixin`."""
