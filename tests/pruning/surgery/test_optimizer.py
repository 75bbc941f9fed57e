"""The optimizer goes on with the compact model as it would have with the masked one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pruning_models import Residual, X, dead
from torch import Tensor, nn

from ffr_ext import CompactionPlan, compact


def train_masked(optimizer: torch.optim.Optimizer, model: Residual, steps: int = 3) -> None:
    """Steps that keep dead filters dead."""
    for step in range(steps):
        one_step(optimizer, model, torch.randn(X, generator=torch.Generator().manual_seed(step)))
        with torch.no_grad():
            for block in model.blocks:
                block.conv1.weight[:5] = 0
                block.bn1.weight[:5] = 0
                block.bn1.bias[:5] = -0.1
                block.bn1.running_mean[:5] = 0


def one_step(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor) -> None:
    model.train()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_next_step_is_the_masked_one(name: str, inplace: bool) -> None:
    torch.manual_seed(3)
    model = dead()
    groups = [
        {"params": [p for n, p in model.named_parameters() if "conv" in n], "weight_decay": 1e-3},
        {"params": [p for n, p in model.named_parameters() if "conv" not in n], "lr": 0.01},
    ]
    optimizer = OPTIMIZERS[name](groups)
    train_masked(optimizer, model)
    masked = Residual()
    masked.load_state_dict(model.state_dict())
    masked_groups = [
        {**g, "params": [p for n, p in masked.named_parameters() if ("conv" in n) == first]}
        for g, first in zip(groups, (True, False), strict=True)
    ]
    masked_optimizer = OPTIMIZERS[name](masked_groups)
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors

    result = compact(model.eval(), torch.randn(X), optimizer=optimizer, inplace=inplace, measure=False)
    assert result.model.blocks[0].conv1.out_channels == 7
    in_optimizer = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(in_optimizer) == len({id(p) for p in in_optimizer})
    assert {id(p) for p in in_optimizer} == {id(p) for p in result.model.parameters()}
    assert set(optimizer.state) <= set(in_optimizer)
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["lr"]) == (1e-3, 0.01)

    x = torch.randn(X)
    one_step(optimizer, result.model, x)
    one_step(masked_optimizer, masked, x)
    expected = result.plan.apply(masked)
    for (n, a), b in zip(result.model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def test_a_bias_in_front_of_a_batch_norm_is_noise_to_adam_and_changes_no_output() -> None:
    """The norm subtracts it, so that its gradient is rounding noise, which Adam divides by its own size."""

    def make() -> nn.Sequential:
        torch.manual_seed(3)
        model = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)),
        )
        with torch.no_grad():
            for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
                tensor[3:37] = 0
        return model

    model, masked = make(), make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    result = compact(model, torch.randn(X), optimizer=optimizer, measure=False)
    x = torch.randn(16, 3, 17, 17)
    one_step(optimizer, result.model, x)
    one_step(torch.optim.Adam(masked.parameters(), lr=1e-2), masked, x)
    expected = result.plan.apply(masked)
    for layer in (0, 3):
        assert result.model[layer].bias.grad.abs().max() < 1e-6
    torch.testing.assert_close(result.model(x), expected(x), rtol=1e-4, atol=1e-5)


def test_a_new_bias_joins_the_group_of_its_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        model[0].weight[:2] = 0
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    )
    one_step(optimizer, model, torch.randn(5, 4))
    with torch.no_grad():
        model[0].weight[:2] = 0
    result = compact(model, torch.randn(5, 4), optimizer=optimizer, measure=False).model
    assert result[2].bias is not None
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(result[2].weight), id(result[2].bias)]
    before = result[2].bias.clone()
    one_step(optimizer, result, torch.randn(5, 4))
    assert not torch.equal(result[2].bias, before)


def test_names_stay_with_their_parameters() -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 8))
    model.add_module("act", nn.Sigmoid())
    model.add_module("last", nn.Linear(8, 3, bias=False))
    model.add_module("behind", nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    result = compact(model, torch.randn(5, 4), optimizer=optimizer, measure=False).model
    (group,) = optimizer.param_groups
    names = {id(p): n for n, p in result.named_parameters()}
    assert "last.bias" in names.values()
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert set(group["param_names"]) == set(names.values())


def test_names_of_a_removed_branch_leave_with_it() -> None:
    model = dead()
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    result = compact(model, torch.randn(X), optimizer=optimizer, measure=False).model
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in result.named_parameters()]


@pytest.mark.parametrize("inplace", [False, True])
def test_an_lbfgs_that_has_not_stepped_trains_the_result(inplace: bool) -> None:
    """It has a reference of its own to the list of parameters."""
    model = dead()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    result = compact(model.eval(), torch.randn(X), optimizer=optimizer, inplace=inplace, measure=False).model
    before = [p.detach().clone() for p in result.parameters()]
    x = torch.randn(X)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = result(x).square().mean()
        loss.backward()
        return loss

    result.train()
    optimizer.step(closure)
    assert not any(torch.equal(old, new) for old, new in zip(before, result.parameters(), strict=True))


def test_a_removed_branch_leaves_the_optimizer() -> None:
    model = dead()
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    result = compact(model, torch.randn(X), optimizer=optimizer, measure=False).model
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in result.parameters()}


def test_other_parameters_of_the_optimizer_stay() -> None:
    model, extra = dead(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *extra.parameters()], lr=0.1)
    compact(model, torch.randn(X), optimizer=optimizer, measure=False)
    assert extra.weight in set(optimizer.param_groups[0]["params"])


def test_the_plan_takes_an_optimizer_too() -> None:
    plan: CompactionPlan = compact(dead(), torch.randn(X), measure=False).plan
    model = dead()
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(optimizer, model, torch.randn(X))
    plan.apply(model, optimizer)
    one_step(optimizer, model, torch.randn(X))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("case", ["factored", "foreign", "history", "flat"])
def test_what_cannot_be_carried_is_refused_and_nothing_changes(case: str) -> None:
    model = dead()
    if case == "factored":
        optimizer: torch.optim.Optimizer = torch.optim.Adafactor(model.parameters())
        one_step(optimizer, model, torch.randn(X))
    elif case == "foreign":
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    elif case == "flat":  # one vector of all parameters, kept with the first, which is not cut
        kept = [p for n, p in model.named_parameters() if "blocks" not in n]
        optimizer = torch.optim.LBFGS([*kept, *model.blocks.parameters()], max_iter=2)
        optimizer.step(lambda: _loss_of(model))
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.blocks[0].conv1.weight]["history"] = [torch.zeros(3)]
    before = [tuple(p.shape) for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises(ValueError, match=r"optimizer: .*(cannot be cut|none of the model's parameters)"):
        compact(model.eval(), torch.randn(X), optimizer=optimizer, inplace=True, measure=False)
    assert [tuple(p.shape) for g in optimizer.param_groups for p in g["params"]] == before
    assert model.blocks[0].conv1.out_channels == 12


def _loss_of(model: nn.Module) -> Tensor:
    model.zero_grad()
    loss: Tensor = model(torch.randn(X)).square().mean()
    loss.backward()
    return loss
