"""How many filters of a network are dead, by their effective scale, and what could be removed with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DEAD = 1e-2  # effective scale under which a filter counts as dead


@dataclass
class Layer:
    """One convolution: filters, dead ones, and the cost of all and of the dead ones."""

    name: str
    filters: int
    dead: int
    weights: int
    zero_weights: int
    flops: int

    @property
    def removable_weights(self) -> int:
        return self.weights * self.dead // self.filters

    @property
    def removable_flops(self) -> int:
        return self.flops * self.dead // self.filters


def effective_scale(norm: nn.BatchNorm2d) -> Tensor:
    """|gamma| sqrt(var / (var + eps)): the standard deviation of each channel behind the norm."""
    var = norm.running_var
    return norm.weight.detach().abs() * (var / (var + norm.eps)).sqrt()


@torch.no_grad()
def report(model: nn.Module, image: Tensor, threshold: float = DEAD) -> list[Layer]:
    """One entry for each convolution that is followed by a batch norm, in the order of the modules.

    What is removable counts the dead filters' own weights and multiply-adds; their readers' input channels
    come on top.
    """
    pixels: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_hook(lambda m, args, output: pixels.update({m: output[0, 0].numel()}))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    was_training = model.training
    model.eval()(image[:1])
    model.train(was_training)
    for handle in handles:
        handle.remove()
    layers, conv = [], None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            conv = (name, module)
        elif isinstance(module, nn.BatchNorm2d) and conv is not None:
            weight = conv[1].weight
            layers.append(
                Layer(
                    name=conv[0],
                    filters=weight.shape[0],
                    dead=int((effective_scale(module) < threshold).sum()),
                    weights=weight.numel(),
                    zero_weights=int((weight == 0).sum()),
                    flops=weight.numel() * pixels[conv[1]],
                )
            )
            conv = None
    return layers


@torch.no_grad()
def switch_off_dead_filters(model: nn.Module, threshold: float = DEAD) -> int:
    """Set gamma of every dead filter to 0, which leaves the constant beta of its channel; how many there
    were."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            dead = effective_scale(module) < threshold
            module.weight[dead] = 0
            count += int(dead.sum())
    return count
