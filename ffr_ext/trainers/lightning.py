"""PyTorch Lightning: one callback, and the user's module stays as it is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins.precision import Precision
except ModuleNotFoundError:  # the older distribution of the same code
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    from pytorch_lightning.plugins.precision import Precision  # type: ignore[assignment]

from torch.optim.optimizer import register_optimizer_step_post_hook

from .._torch import unscales_by_itself
from ..flow.feature_flow import FeatureFlow
from ..flow.layers import LayerSpec
from ..regularizers.base import Regularizer
from ..schedules import WeightSchedule
from .common import Spec, flows, made, named_terms, owned, specs


class FFRCallback(Callback):
    """Add the feature-flow penalty, or other regularizers, to every training step.

    ::

        trainer = lightning.Trainer(callbacks=[FFRCallback(gradient=3.0, curvature=3.0)])
        trainer = lightning.Trainer(callbacks=[FFRCallback(regularizers=lambda model: ScaleLasso(model, weight=1e-4))])

    What the module runs during a training batch is recorded: use ``self(x)``, ``self.net(x)`` or functions in
    ``training_step`` as you like. Several calls, of two views for instance, are several paths, whose penalties are
    added; calls in eval mode or without autograd, of a teacher for instance, are left out
    (:meth:`ffr_ext.FeatureFlow.begin_pass` says what a call is).

    The penalty of a call joins each backward pass whose loss depends on that call, right before it: that of the
    generator's step in a GAN, whichever network steps first, and that of every call of a closure (LBFGS). Under
    gradient accumulation it is a mean over the micro-batches, under a ``GradScaler`` scaled like the loss. Under manual
    optimisation backward passes have to go through ``self.manual_backward``.

    A penalty of weights adds its gradient once per optimizer step, before Lightning clips gradients, and its ``step()``
    follows the optimizer's. (Under manual optimisation, clip inside ``configure_gradient_clipping`` or after
    ``on_before_optimizer_step``: gradients that the step has clipped before ``optimizer.step()`` lack it.)

    Logs ``ffr/penalty`` and ``ffr/factor`` (of the last backward pass with a penalty), and ``ffr/length/<term>`` and
    ``ffr/curvature/<term>`` every ``trainer.log_every_n_steps`` steps; the terms of several calls are counted through.
    Terms of other regularizers are ``ffr/<class>/<term>``. Where a trainer has several of these callbacks, the name or
    module follows ``ffr/``.

    Args:
        layers: see :class:`ffr_ext.FeatureFlow`; names are relative to ``module``.
        module: the submodule to look for layers in, by its name in the LightningModule; default the whole of it.
        regularizers: one or several, instead of a FeatureFlow with these ``layers`` and ``options``: regularizers, or
            functions of the module that make one when ``fit`` starts.
        schedule: keywords of :class:`ffr_ext.schedules.WeightSchedule`, in optimizer steps.
        log: whether to log.
        name: tells two callbacks of one module apart, in checkpoints and logs.
        options: keywords of :class:`ffr_ext.FeatureFlow`.

    Attributes:
        regularizers: from the start of ``fit`` on.
        flow: the first :class:`ffr_ext.FeatureFlow` among them.

    Raises:
        TypeError: ``regularizers`` together with ``layers`` or ``options``, or something that is none.
    """

    def __init__(
        self,
        layers: LayerSpec = "auto",
        *,
        module: str = "",
        regularizers: Spec | Iterable[Spec] | None = None,
        schedule: dict[str, Any] | None = None,
        log: bool = True,
        name: str = "",
        **options: Any,
    ) -> None:
        super().__init__()
        if regularizers is not None and (options or layers != "auto"):
            raise TypeError(
                "regularizers: expected them alone, got layers or options of a FeatureFlow too; pass "
                "lambda model: FeatureFlow(model, ...) among the regularizers"
            )
        self.layers = layers
        self.module = module
        self.specs = specs(regularizers)
        self.schedule_options = dict(schedule or {})
        self.log = log
        self.name = name
        self.options = options
        self.regularizers: list[Regularizer] = []
        self.schedule: WeightSchedule | None = None
        self._steps = 0
        self._states: list[dict[str, Any]] = []
        self._undo: list[Callable[[], Any]] = []
        self._owners: dict[int, int] = {}  # which optimizer has the parameters of a penalty of weights
        self._joined_in_epoch = True
        self._start_batch()

    def _start_batch(self) -> None:
        self._penalty: Tensor | None = None
        self._share: Tensor | None = None  # what the losses of the batch, or of a closure call, lack

    @property
    def state_key(self) -> str:
        """Tells the callbacks of two networks apart in a checkpoint."""
        told = [self.name or self.module, *(_name_of(spec) for spec in self.specs)]
        told = [each for each in told if each]
        return type(self).__qualname__ + (f"[{', '.join(told)}]" if told else "")

    @property
    def flow(self) -> FeatureFlow | None:
        """The first FeatureFlow, from the start of ``fit`` on."""
        return next(iter(flows(self.regularizers)), None)

    # --- fit begins and ends ----------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After ``configure_model`` has made the layers, before anything is run or traced by
        ``torch.compile``."""
        target: nn.Module = pl_module.get_submodule(self.module) if self.module else pl_module
        if self.specs:
            self.regularizers = made(self.specs, target)
        else:
            self.regularizers = [FeatureFlow(target, self.layers, **self.options)]
        if any(each.joins_loss for each in self.regularizers):
            _check_backward(trainer)
        for regularizer in self.regularizers:
            regularizer.attach()
        self.schedule = WeightSchedule(self.regularizers, **self.schedule_options)
        for regularizer, state in zip(self.regularizers, self._states, strict=False):
            regularizer.load_state_dict(state)
        self.schedule.set(self._steps)
        self._joined_in_epoch = True
        # A bound method: a copy or pickle of the module has its own in its place.
        pl_module.backward = MethodType(backward, pl_module)  # type: ignore[method-assign]
        self._undo.append(lambda: vars(pl_module).pop("backward", None))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """When the optimizers are there."""
        for regularizer in self.regularizers:
            if not regularizer.joins_loss:
                owner = self._owners[id(regularizer)] = owned(regularizer, trainer.optimizers)
                self._after_steps_of(trainer.optimizers[owner], regularizer)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                self._complete_closures_of(optimizer)

    def _after_steps_of(self, optimizer: torch.optim.Optimizer, regularizer: Regularizer) -> None:
        """Let `step` follow the optimizer's, which a GradScaler may leave out."""

        def after(stepped: torch.optim.Optimizer, *_args: Any) -> None:
            if stepped is optimizer and regularizer.enabled:
                regularizer.step()

        # Hooks of one optimizer run before those of all, among which regularizers take note of steps.
        self._undo.append(register_optimizer_step_post_hook(after).remove)

    def _complete_closures_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a line search see the penalty in the loss that a closure returns, as its gradient has it."""
        step = optimizer.step

        @functools.wraps(step)
        def with_penalty(closure: Callable[[], Any]) -> Any:
            def complete() -> Any:
                self._share = None
                loss = closure()
                if loss is None:
                    return None
                for each in self.regularizers:
                    if not each.joins_loss and each.enabled:
                        loss = loss + each.loss().detach()
                return loss if self._share is None else loss + self._share

            return step(complete)

        optimizer.step = with_penalty  # type: ignore[method-assign, assignment]
        self._undo.append(lambda: setattr(optimizer, "step", step))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        for regularizer in self.regularizers:
            regularizer.detach()

    # --- a batch ----------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing has been penalised in it yet."""
        self._joined_in_epoch = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the pass."""
        schedule = self._ready()
        schedule.set(trainer.global_step)
        self._steps = trainer.global_step
        self._start_batch()
        for regularizer in self.regularizers:
            if isinstance(regularizer, FeatureFlow):
                # A strategy that wraps the module calls the step through the module's forward.
                in_forward = regularizer.model is pl_module and trainer.model is not pl_module
                regularizer.begin_pass(within_forward=in_forward)
            elif regularizer.enabled:
                regularizer.before_forward()

    def with_penalty(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> Tensor:
        """`loss`, which is about to be differentiated, with the penalties of the calls it depends on."""
        penalties = []
        for regularizer in self.regularizers:
            if isinstance(regularizer, FeatureFlow):
                penalty = regularizer.loss_for(loss, required=pl_module.automatic_optimization)
            else:
                penalty = regularizer.loss() if regularizer.joins_loss and regularizer.enabled else None
            if penalty is not None:
                penalties.append(penalty)
        if not penalties:
            return loss
        if loss.numel() != 1:
            raise ValueError(
                f"FFRCallback: expected a loss of one element for manual_backward, got one of shape {tuple(loss.shape)}"
            )
        penalty = torch.stack([each.to(penalties[0]) for each in penalties]).sum()
        share = penalty / trainer.accumulate_grad_batches
        self._penalty = penalty.detach()
        self._share = share.detach() if self._share is None else self._share + share.detach()
        self._joined_in_epoch = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return loss + (share if scaler is None else scaler.scale(share)).to(loss).reshape(loss.shape)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are there, unscaled and not clipped yet."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = scaler.get_scale() if scaler is not None and unscales_by_itself(optimizer) else 1.0
        for regularizer in self.regularizers:
            if isinstance(regularizer, FeatureFlow):
                continue  # its pass goes on: the batch may have more
            regularizer.after_backward()
            if regularizer.joins_loss or not regularizer.enabled:
                continue
            if trainer.optimizers[self._owners[id(regularizer)]] is _unwrapped(optimizer):
                regularizer.scale, scale = regularizer.scale * factor, regularizer.scale
                regularizer.add_gradients_()
                regularizer.scale = scale
                self._joined_in_epoch = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the pass and log."""
        for regularizer in self.regularizers:
            if isinstance(regularizer, FeatureFlow) and regularizer.passed_by():
                warnings.warn(
                    "FFRCallback: a backward pass went through the network without its penalty; if that was a "
                    "loss.backward() in training_step, call self.manual_backward(loss) instead",
                    stacklevel=2,
                )
            regularizer.after_backward()
        if self.log:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A penalty that changes nothing is no silent one."""
        if self._ready().factor and not self._joined_in_epoch:
            warnings.warn(
                "FFRCallback: no backward pass of this epoch had a penalty of the network "
                f"{self.module or type(pl_module).__name__!r} in it: the penalty changed nothing",
                stacklevel=2,
            )

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prefix = self._prefix(trainer)
        if self._penalty is not None:
            pl_module.log(f"{prefix}/penalty", self._penalty)
            pl_module.log(f"{prefix}/factor", self._ready().factor)
        if trainer.global_step % _log_interval(trainer) != 0:
            return
        for regularizer in self.regularizers:
            if isinstance(regularizer, FeatureFlow) and self._penalty is None:
                continue
            own = prefix if regularizer is self.flow else f"{prefix}/{type(regularizer).__name__}"
            terms = named_terms(regularizer)
            pl_module.log_dict({f"{own}/{name}": value for name, value in terms.items()})

    def _prefix(self, trainer: Trainer) -> str:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        several = sum(isinstance(callback, FFRCallback) for callback in callbacks) > 1
        told = self.name or self.module
        return f"ffr/{told}" if several and told else "ffr"

    # --- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer steps taken, so that a resumed run continues its schedule, and the regularizers' own state."""
        return {"steps": self._steps, "regularizers": [each.state_dict() for each in self.regularizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = int(state_dict["steps"])
        self._states = list(state_dict.get("regularizers", []))
        for regularizer, state in zip(self.regularizers, self._states, strict=False):
            regularizer.load_state_dict(state)
        if self.schedule is not None:
            self.schedule.set(self._steps)

    def _ready(self) -> WeightSchedule:
        if self.schedule is None:
            raise RuntimeError(
                "FFRCallback: on_fit_start() has not run; pass the callback to the Trainer's callbacks="
            )
        return self.schedule


def backward(module: LightningModule, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """`LightningModule.backward` of the loss and the penalties of its graph. The loss itself is not touched: its own
    backward may need it, and it may be a view."""
    for callback in _callbacks(module):
        loss = callback.with_penalty(module.trainer, module, loss)
    type(module).backward(module, loss, *args, **kwargs)


def _callbacks(module: LightningModule) -> list[FFRCallback]:
    try:
        trainer: Any = module.trainer
    except RuntimeError:  # a copy of a module in training belongs to no trainer
        return []
    return [callback for callback in trainer.callbacks if isinstance(callback, FFRCallback)]


def _check_backward(trainer: Trainer) -> None:
    """Refuse a strategy whose backward pass is not the LightningModule's: the penalty could not join it."""
    plugin = trainer.precision_plugin
    if type(plugin).backward is not Precision.backward:
        raise RuntimeError(
            f"FFRCallback: {type(plugin).__name__} runs backward passes by itself, which a penalty of features cannot "
            "join; add flow.loss() to the loss in training_step (ffr_ext.FeatureFlow)"
        )


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _name_of(spec: Spec) -> str:
    return type(spec).__name__ if isinstance(spec, Regularizer) else getattr(spec, "__name__", "")


def _log_interval(trainer: Trainer) -> int:
    return max(int(getattr(trainer, "log_every_n_steps", 1)), 1)  # an attribute without a declaration
