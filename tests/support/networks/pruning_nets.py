"""Small nets with dead filters, one for each thing an op can do to them, and the check that all pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffr_ext import compact


class Net(nn.Module):
    """Layers by name, and a function of them as forward."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    left: dict[str, int]
    reason: str


def kill(layer: nn.Module, filters: slice | list[int], bias: float = 0.0, dim: int = 0) -> nn.Module:
    """Zero filters of a layer and set their bias."""
    with torch.no_grad():
        layer.weight.movedim(dim, 0)[filters] = 0
        if layer.bias is not None:
            layer.bias[filters] = bias
    return layer


def conv(
    i: int, o: int, k: int = 3, dead: slice | list[int] = slice(0), bias: float = 0.0, **kw: Any
) -> nn.Module:
    return kill(nn.Conv2d(i, o, k, **kw), dead, bias)


def linear(i: int, o: int, dead: slice | list[int] = slice(0), bias: float = 0.0) -> nn.Module:
    return kill(nn.Linear(i, o), dead, bias)


def norm(channels: int, dead: slice | list[int] = slice(0), beta: float = 0.0) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight[dead] = 0
        layer.bias[dead] = beta
    return layer


DEAD = slice(0, 3)
IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)


def check_case(case: Case) -> None:
    """What must leave leaves, nothing else does, and the outputs stay."""
    model = case.make().eval()
    before = [p.clone() for p in model.parameters()]
    result = compact(model, torch.randn(case.shape), measure=False)
    for layer, expected in case.left.items():
        module, _, attribute = layer.partition(".")
        found = getattr(result.model, module)
        got = getattr(found, attribute) if attribute else found.weight.shape[0]
        if isinstance(found, nn.ConvTranspose2d):
            got = found.weight.shape[1]
        assert got == expected, f"{layer}: {case.reason}\n{result.report.explain()}"
    x = torch.randn(case.shape)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    attributes_match_weights(result.model)


def attributes_match_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
            assert module.bias is None or module.bias.shape == (module.out_channels,)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,)


def constant_behind_padding() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = 0.5
    return model.eval()
