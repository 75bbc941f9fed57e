"""`form="prox"`: which map `step` applies, when, and how far."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lenet_double import X, Y, lenet

from ffr_ext.regularizers import ScaleLasso, SparseGroupLasso, prox


def test_slimming_by_proximal_map_is_a_soft_threshold() -> None:
    model = lenet()
    gamma = model[1].weight.detach().clone()
    slim = ScaleLasso(model, weight=0.3, form="prox", step_size=1.0)
    slim.add_gradients_()
    assert model[1].weight.grad is None
    assert float(slim.loss()) == 0
    slim.step()
    torch.testing.assert_close(model[1].weight.detach(), prox("l1", gamma, 0.3), rtol=1e-12, atol=1e-15)
    assert torch.equal(model[1].weight == 0, gamma.abs() <= 0.3)


@pytest.mark.parametrize("groups", ["out", "paper"])
def test_groups_shrink_by_the_proximal_map_of_their_norm(groups: str) -> None:
    model = lenet()
    before = copy.deepcopy(model)
    SparseGroupLasso(
        model, weight=0.05, sparse=None, groups=groups, include_norm=False, form="prox", step_size=1.0
    ).step()
    for index in (0, 4, 7, 9):
        old, new = before[index].weight.detach(), model[index].weight.detach()
        if groups == "paper" and old.dim() == 2:
            old, new = old.t(), new.t()
        for was, now in zip(old, new, strict=True):
            expected = prox("group", was, 0.05 * math.sqrt(was.numel()))
            torch.testing.assert_close(now, expected, rtol=1e-12, atol=1e-15)
            assert bool(now.any()) == bool(expected.any())


@pytest.mark.parametrize(
    ("make_optimizer", "size"),
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.5), 0.5, id="SGD"),
        pytest.param(
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0, id="momentum keeps the strength"
        ),
        pytest.param(lambda p: torch.optim.Adam(p, lr=0.02), 0.02, id="Adam: its rate"),
    ],
)
def test_thresholds_follow_the_learning_rate(make_optimizer: Callable[..., Any], size: float) -> None:
    model = lenet()
    slim = ScaleLasso(model, weight=0.3, form="prox")
    fixed = ScaleLasso(model, weight=0.3, form="prox", step_size=0.01)
    optimizer = make_optimizer(model.parameters())
    optimizer.step()  # without gradients: nothing moves
    gamma = model[1].weight.detach().clone()
    slim.step()
    torch.testing.assert_close(model[1].weight.detach(), prox("l1", gamma, 0.3 * size))
    gamma = model[1].weight.detach().clone()
    fixed.scale = 2.0
    fixed.step()
    torch.testing.assert_close(model[1].weight.detach(), prox("l1", gamma, 2 * 0.3 * 0.01))


def test_coupled_groups_reach_exact_zeros_that_compact_takes_out() -> None:
    from ffr_ext import compact

    model = lenet()
    lasso = SparseGroupLasso(
        model, weight=0.02, sparse="l0", beta=0.5, groups="coupled", example_inputs=X, form="prox"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        lasso.add_gradients_()
        optimizer.step()
        lasso.step()
    dead = int((lasso.norms() == 0).sum())
    assert dead > 0
    with torch.no_grad():
        model[1].bias.clamp_(max=0)  # relu makes 0 of what is left of a dead channel
        model[4].bias.clamp_(max=0)
        model[7].bias.clamp_(max=0)
    result = compact(model.eval(), X, measure=False)
    assert result.report.parameters[1] < result.report.parameters[0]


@pytest.mark.parametrize("step_size", [None, 0.01])
def test_a_step_that_a_gradient_scaler_leaves_out_shrinks_nothing(step_size: float | None) -> None:
    """The first, before any optimizer has stepped, and a later one."""
    model = lenet()
    slim = ScaleLasso(model, weight=0.3, form="prox", step_size=step_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    shrunk = []
    for overflows in (True, False, True, True, False):
        before = model[1].weight.detach().clone()
        loss = model(X).square().mean() * (math.inf if overflows else 0.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        slim.step()
        scaler.update()
        optimizer.zero_grad()
        shrunk.append(not torch.equal(model[1].weight.detach(), before))
    assert shrunk == [False, True, False, False, True]


def test_a_map_that_follows_no_optimizer_says_so_once() -> None:
    model = lenet()
    before = copy.deepcopy(model.state_dict())
    slim = ScaleLasso(model, weight=0.3, form="prox")
    with pytest.warns(UserWarning, match="no torch.optim optimizer has stepped its"):
        slim.step()
    with warnings.catch_warnings(action="error"):
        slim.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_the_optimizer_does_not_have_are_not_shrunk() -> None:
    model = lenet()
    optimizer = torch.optim.SGD(model[9].parameters(), lr=0.5)
    lasso = SparseGroupLasso(model, weight=0.05, sparse=None, form="prox")
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    lasso.step()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["9.weight"]


def test_a_proximal_map_shows_nan_too() -> None:
    model = lenet()
    with torch.no_grad():
        model[0].weight[2, 0, 0, 0] = math.nan
        model[1].weight[3] = math.nan
    ScaleLasso(model, weight=0.1, form="prox", step_size=1.0).step()
    assert model[1].weight.isnan().tolist() == [False] * 3 + [True] + [False] * 2
    SparseGroupLasso(model, weight=0.01, sparse=None, include_norm=False, form="prox", step_size=1.0).step()
    assert model[0].weight.isnan().flatten(1).any(1).tolist() == [False, False, True, False, False, False]
