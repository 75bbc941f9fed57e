"""`ScaleLasso`: network slimming, the l1 norm of the norms' scales."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ..pruning.filters import BatchNorm
from ..pruning.graph.groups.slices import Axis, Slices
from ..pruning.graph.states import on_cpu
from .penalty import GroupPenalty, check_regularizes_something

_NORMS = (*BatchNorm, _InstanceNorm, nn.GroupNorm)


class ScaleLasso(GroupPenalty):
    """``scale * weight * sum |gamma|`` over the scales of all batch, instance and group norms of a model.

    Network slimming (Liu, Li, Shen, Huang, Yan, Zhang; ICCV 2017): a channel whose gamma is 0 is a constant, which
    `compact` takes out. Equal to::

        weight * sum(norm.weight.abs().sum() for norm in norms)

    with sign(0) = 0, added to the gradients without autograd::

        slimming = ScaleLasso(model, weight=1e-4)
        ...
        loss.backward(); slimming.add_gradients_(); optimizer.step(); slimming.step()

    Args:
        model: any module, wrapped or not.
        weight: a finite number of at least 0.
        form: ``"gradient"``, as published: gammas come near 0 and swing around it, so zero them at the end
            (`zero_small_filters`). ``"prox"``: `step` soft-thresholds them after the optimizer's step, at exact zeros.
        step_size: for ``"prox"``, see `GroupPenalty`: by default the optimizer's learning rate.

    Raises:
        TypeError, ValueError: an argument is not as above, or no norm of the model has a scale for each channel.
    """

    @on_cpu
    def __init__(
        self, model: nn.Module, *, weight: float, form: str = "gradient", step_size: float | None = None
    ) -> None:
        axes: list[Axis] = []
        count = 0
        seen: set[int] = set()
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            gamma = getattr(module, "weight", None)
            if not isinstance(module, _NORMS) or not isinstance(gamma, nn.Parameter) or id(gamma) in seen:
                continue
            if is_lazy(gamma):
                raise ValueError(
                    f"model: {name} has no size yet; run the model once before it is regularised"
                )
            seen.add(id(gamma))
            path = f"{name}.weight" if name else "weight"
            axes.append(Axis(path, 0, "scale", torch.arange(count, count + gamma.numel())))
            count += gamma.numel()
        if isinstance(model, nn.Module):
            hint = "no batch, instance or group norm has a scale for each channel"
            check_regularizes_something("ScaleLasso", count, hint)
        layers = {axis.name.removesuffix(".weight"): axis.groups for axis in axes}
        slices = Slices(model, axes, count)
        super().__init__(
            model, slices, torch.ones(count), layers, weight=weight, form=form, step_size=step_size
        )
