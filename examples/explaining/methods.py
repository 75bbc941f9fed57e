"""The methods that are compared: each gives heat (B, H, W) for images and the classes to explain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffr_ext.explain import Selection, backward_rule, explain

Method = Callable[[nn.Module, Tensor, Tensor], Tensor]


def from_the_logit(**rule: str) -> Method:
    """|gradient| of the class's logit, the largest over colours; under a rule if one is given."""

    def heat(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        context: AbstractContextManager[object] = backward_rule(**rule) if rule else nullcontext()
        with context:
            logits = model(x)
        chosen = logits.gather(1, target[:, None]).sum()
        return torch.autograd.grad(chosen, x)[0].abs().amax(1)

    return heat


def grad_cam(layer: str) -> Method:
    """Selvaraju et al. 2017: maps weighted by their mean gradient, the positive part, stretched bilinearly."""

    def heat(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        maps: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda module, args, output: maps.append(output)
        )
        try:
            logits = model(x)
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), maps[0])
        cam = (maps[0] * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).clamp(min=0).detach()
        return F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]

    return heat


def selected(selection: Selection, **options: str) -> Method:
    def heat(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # images without any feature score 0, which is what the table shows
            return explain(model, x, selection, target=target, **options).heat

    return heat


def deviation(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Without any net: how far a pixel's colour is from the image's mean colour."""
    return (x - x.mean((2, 3), keepdim=True)).norm(dim=1)


def everything(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return torch.ones_like(x[:, 0])


def grid(heat: Tensor, step: int = 2) -> float:
    """Standard deviation over the phases of a grid of their mean heat, as a share of the mean; 0 without a grid."""
    sizes = [s // step * step for s in heat.shape[1:]]
    blocks = heat[:, : sizes[0], : sizes[1]].unfold(1, step, step).unfold(2, step, step)
    phases = blocks.double().mean((0, 1, 2))
    return float(phases.std(unbiased=False) / phases.mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean over images of Pearson's correlation of two heatmaps."""
    a, b = (h.flatten(1).double() - h.flatten(1).double().mean(1, keepdim=True) for h in (a, b))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean())
