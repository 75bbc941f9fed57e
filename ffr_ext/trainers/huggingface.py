"""Hugging Face transformers: a thin Trainer, and the mixin it is made of for trainers of your own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from ..flow.feature_flow import FeatureFlow
from ..flow.layers import LayerSpec
from ..schedules import WeightSchedule


class FFRTrainerMixin:
    """Adds the feature-flow penalty to ``compute_loss``; put it in front of any ``transformers.Trainer``.

    ::

        class MyTrainer(FFRTrainerMixin, Seq2SeqTrainer): ...

    Args:
        ffr_layers: ``layers`` of :class:`ffr_ext.FeatureFlow`; ``"auto"`` finds the transformer layers.
        ffr_options: keywords of :class:`ffr_ext.FeatureFlow`, such as ``{"gradient": 1.0, "curvature":
        1.0}``.
        ffr_schedule: keywords of :class:`ffr_ext.schedules.WeightSchedule`, in optimiser steps. The step
            is the trainer's ``state.global_step``, which its checkpoints hold, so a resumed run continues the
            schedule.

    Under gradient accumulation the penalty is the mean over the micro-batches, also where the Trainer
    leaves the loss of the model undivided because that is normalised by ``num_items_in_batch``. Logs get
    ``ffr_penalty`` and ``ffr_factor``, and ``ffr_length_<term>`` and ``ffr_curvature_<term>``.

    Attributes:
        flow: the :class:`ffr_ext.FeatureFlow`; its hooks are on the model while ``train()`` runs.
    """

    def __init__(
        self,
        *args: Any,
        ffr_layers: LayerSpec = "auto",
        ffr_options: dict[str, Any] | None = None,
        ffr_schedule: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self._ffr = (ffr_layers, ffr_options or {}, ffr_schedule or {})
        self._watch(trainer.model)
        self._penalty: torch.Tensor | None = None

    def _watch(self, model: Any) -> None:
        layers, options, schedule = self._ffr
        self.flow = FeatureFlow(model, layers, **options)
        self.schedule = WeightSchedule(self.flow, **schedule)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """``Trainer.train`` with the hooks on the model, from before it is wrapped or compiled until the
        end."""
        self.flow.attach()
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.flow.detach()

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of the wrapped Trainer plus the penalty, in training only."""
        trainer: Any = self
        if trainer.model is not self.flow.model:  # model_init makes a new one when train() starts
            self.flow.detach()
            self._watch(trainer.model)
            self.flow.attach()
        self.schedule.set(trainer.state.global_step)
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training and torch.is_grad_enabled() and self.flow.attached and self.flow.enabled:
            penalty = self.flow.loss()
            self._penalty = penalty.detach()
            if self._loss_is_whole(num_items_in_batch):
                penalty = penalty / _accumulation(trainer)
            loss = loss + penalty.to(loss)
        return (loss, outputs) if return_outputs else loss

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
        if self._penalty is not None and "loss" in logs:
            logs["ffr_penalty"] = self._penalty.item()
            logs["ffr_factor"] = self.schedule.factor
            terms = self.flow.terms()
            for kind, values in (("length", terms.gradient), ("curvature", terms.curvature)):
                logs.update({f"ffr_{kind}_{index}": value for index, value in enumerate(values.tolist())})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _accumulation(trainer: Any) -> int:
    """Micro-batches in the running accumulation; the last one of an epoch may be shorter."""
    return int(
        getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    )


class FFRTrainer(FFRTrainerMixin, Trainer):
    """``transformers.Trainer`` with the feature-flow penalty, see :class:`FFRTrainerMixin`."""
