"""What docs/regularizers.md says of Torch-Pruning, seen in the installed version, and what this package does there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffr_ext import compact
from ffr_ext.pruning import prune_to
from ffr_ext.regularizers import SparseGroupLasso

tp = pytest.importorskip("torch_pruning")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def pruner(model: nn.Sequential, **options: Any) -> Any:
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return tp.pruner.GroupNormPruner(
        model, X, importance=importance, reg=1e-3, ignored_layers=[model[8]], **options
    )


def their_gradients(width: int, **options: Any) -> list[Tensor]:
    model = network(width)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    theirs = pruner(model, **options)
    theirs.update_regularizer()
    theirs.regularize(model)
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_a_layer_of_one_channel_gets_a_gradient_here_and_nan_there() -> None:
    assert any(bool(grad.isnan().any()) for grad in their_gradients(1))
    model = network(1)
    SparseGroupLasso(model, weight=1e-3, groups="out").add_gradients_()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool(model[0].weight.grad.any())


def test_their_alpha_changes_nothing() -> None:
    for a, b in zip(their_gradients(8, alpha=4), their_gradients(8, alpha=40), strict=True):
        assert torch.equal(a, b)


def with_dead_channels() -> nn.Sequential:
    """Four constant channels: their scale is 0 and their shift is not."""
    model = network(8).eval()
    with torch.no_grad():
        model[1].weight[:4], model[1].bias[:4] = 0, 1
    return model


def test_constants_of_dead_channels_stay_here_and_are_lost_there() -> None:
    model = with_dead_channels()
    before = model(X)
    smaller = compact(copy.deepcopy(model), X, measure=False).model
    assert smaller[0].out_channels == 4
    torch.testing.assert_close(smaller(X), before)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=X)
    graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=[0, 1, 2, 3]).prune()
    assert model[0].out_channels == 4
    assert float((model(X) - before).detach().abs().max()) > 0.1


def owned(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bool]:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [id(p) in known for p in model.parameters()]


def test_the_optimizer_trains_the_smaller_network_here_and_not_there() -> None:
    model = network(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert all(owned(prune_to(model, X, flops=0.7, optimizer=optimizer, measure=False).model, optimizer))
    model = network(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner(model, pruning_ratio=0.5).step()
    assert model[0].out_channels == 4
    assert not all(owned(model, optimizer))
