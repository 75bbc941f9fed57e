"""What every regularizer has in common: the protocol that schedules and trainers rely on, and a base class for it.

A step with any regularizer, written out::

    reg.before_forward()
    loss = criterion(model(x), y)
    if reg.joins_loss:
        loss = loss + reg.loss()        # or for all kinds alike, a little slower for those of weights
    loss.backward()
    reg.after_backward()
    (unscale, if gradients are scaled)
    if not reg.joins_loss:
        reg.add_gradients_()            # once per optimizer step, before gradients are clipped
    optimizer.step()
    reg.step()

There are two kinds. A penalty of *features* (`FeatureFlow`) is made of what a forward pass computed and belongs to the
backward pass of that forward's graph: `joins_loss` is True. A penalty of *weights* (a group lasso) is a function of the
parameters alone, whose gradient can be added to `.grad` without autograd: `joins_loss` is False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11


@runtime_checkable
class Regularizer(Protocol):
    """What :class:`ffr_ext.schedules.WeightSchedule` and the trainers take. :class:`BaseRegularizer` has all of it.

    Attributes:
        model: the module that is regularized.
        joins_loss: whether the penalty is made of a forward pass and has to be part of a loss (True), or is a function
            of the parameters alone, which `add_gradients_` differentiates by itself (False).
        scale: a finite float that multiplies everything: the loss, the added gradients, the thresholds of `step`. A
            schedule drives it; the weights that the user chose stay what they are.
        enabled: while False the regularizer does nothing: `add_gradients_` and `step` return at once, and `loss` is
            either 0 (of weights) or refused (of features, since nothing was captured).
    """

    model: nn.Module
    scale: float
    enabled: bool

    @property
    def joins_loss(self) -> bool: ...

    def loss(self) -> Tensor: ...

    def add_gradients_(self) -> None: ...

    def before_forward(self) -> None: ...

    def after_backward(self) -> None: ...

    def step(self) -> None: ...

    def parameters(self) -> list[nn.Parameter]: ...

    def terms(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def attach(self) -> Any: ...

    def detach(self) -> None: ...


class BaseRegularizer:
    """A regularizer of one's own: give it a :meth:`loss`, and override what can be done better.

    ::

        class L2(BaseRegularizer):
            def loss(self):
                return self.scale * sum(p.square().sum() for p in self.parameters())

    Args:
        model: the module that is regularized.

    Raises:
        TypeError: ``model`` is no module.
    """

    joins_loss: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._scale = 1.0
        self._enabled = True

    @property
    def scale(self) -> float:
        """What everything is multiplied by."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = finite("scale", value)

    @property
    def enabled(self) -> bool:
        """Whether it does anything."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)

    @property
    def active(self) -> bool:
        """Whether it is enabled and its scale is not 0: what `add_gradients_` and `step` look at first."""
        return self.enabled and self.scale != 0

    def loss(self) -> Tensor:
        """The penalty times :attr:`scale`, a 0-dim tensor that can be differentiated once; 0 while not enabled."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def add_gradients_(self) -> None:
        """Add the gradient of :meth:`loss` to the parameters' ``.grad`` in place.

        A parameter without a gradient gets one. Call it once per optimizer step, after the last backward pass of the
        step (and after ``scaler.unscale_``), before gradients are clipped. The default differentiates :meth:`loss`;
        override it where the gradient can be written down without autograd.
        """
        if self.active:
            loss = self.loss()
            if loss.requires_grad:
                loss.backward()

    def before_forward(self) -> None:
        """What has to be done before the forward pass of a training step; nothing for most."""

    def after_backward(self) -> None:
        """Undo it after the backward pass, before the optimizer's step."""

    def step(self) -> None:
        """What has to be done to the weights after ``optimizer.step()`` (a proximal map, a threshold); nothing for
        most."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that :meth:`loss` depends on and that can be trained: by default all of the model's. A trainer
        with several optimizers adds gradients when the optimizer that owns them steps."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def terms(self) -> dict[str, Tensor]:
        """What there is to log, detached, one 0-dim tensor a name (of a layer, for instance); without :attr:`scale`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the scale, and what a subclass adds. Settings belong to the code that resumes."""
        return {"scale": self.scale, "enabled": self.enabled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: it is not what :meth:`state_dict` returned.
        """
        if not isinstance(state, Mapping) or "scale" not in state:
            raise ValueError(f"state: expected what state_dict() returned, {{'scale': ...}}, got {state!r}")
        enabled = state.get("enabled", True)
        if not isinstance(enabled, bool):
            raise ValueError(f"state['enabled']: expected True or False, got {enabled!r}")
        self.scale = state["scale"]
        self.enabled = enabled

    def attach(self) -> Self:
        """Put hooks on the model, where the method needs some; no effect if they are there."""
        return self

    def detach(self) -> None:
        """Take them off."""

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()


def finite(name: str, value: Any) -> float:
    """`value` as a float; TypeError if it is no real number, ValueError if it is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a float, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite float, got {value!r}")
    return number
