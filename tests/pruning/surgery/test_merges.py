"""Merges in the plan: applied to parameters, carried along by the optimizer, saved, composed, refused where damaged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import fingerprint
from pruning_nets import constant_behind_padding
from torch import Tensor, nn

from ffr_ext import CompactionPlan, compact
from ffr_ext.pruning.surgery.compose import compose
from ffr_ext.pruning.surgery.cuts import Cut
from ffr_ext.pruning.surgery.merges import Merge, merged

X = (2, 3, 8, 8)
VALUES = torch.tensor([0.2, 0.9, 0.4])


def model_of_three() -> nn.Sequential:
    torch.manual_seed(0)
    model = constant_behind_padding()
    with torch.no_grad():
        model[0].bias[:3] = VALUES
    return model


def test_the_weight_is_the_sum_by_hand() -> None:
    model = model_of_three()
    result = compact(model, torch.randn(X), measure=False)
    values = torch.nn.functional.silu(VALUES)
    by_hand = (model[2].weight[:, :3] * (values / values[1]).view(1, 3, 1, 1)).sum(1)
    torch.testing.assert_close(result.model[2].weight[:, 0], by_hand)
    assert torch.equal(result.model[0].bias[0], VALUES[1])


@pytest.mark.parametrize("rows", [None, [2, 3]])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_are_added_along_either_dimension(dim: int, rows: list[int] | None) -> None:
    if dim == 0 and rows:
        pytest.skip("the rows of a group are along dimension 0")
    weight = torch.randn(4, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    before = weight.clone()
    result = merged(
        weight, [Merge(dim, [0, 1], [3, 3], [2.0, -0.5], rows), Merge(dim, [3], [2], [1.0], rows)]
    )
    expected = before.clone()
    where = (slice(None), slice(None)) if rows is None else (slice(None), torch.tensor(rows))
    moved, old = expected.movedim(dim, 0), before.movedim(dim, 0)
    for onto, value in (
        (3, old[3] + 2 * old[0] - 0.5 * old[1]),
        (2, old[2] + old[3] + 2 * old[0] - 0.5 * old[1]),
    ):
        moved[onto][where[1]] = value[where[1]]
    torch.testing.assert_close(result, expected)
    assert torch.equal(weight, before)
    assert result.stride() == weight.stride()


# ---------------------------------------------------------------------------------------------------
# Saved and loaded
# ---------------------------------------------------------------------------------------------------


def test_a_plan_with_merges_comes_back_from_its_file(tmp_path: Path) -> None:
    model = model_of_three()
    result = compact(model, torch.randn(X), measure=False)
    result.plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 2
    (entry,) = data["merges"]["2.weight"]
    assert (entry["dim"], entry["from"], entry["onto"]) == (1, [0, 2], [1, 1])
    loaded = CompactionPlan.load(tmp_path / "plan.json")
    assert loaded == result.plan
    for a, b in zip(loaded.apply(model).parameters(), result.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_plan_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """Version 1 knows no merges: neither its file nor its checksum names them."""
    plan = CompactionPlan({"weight": (4, 3)}, {"weight": [Cut(0, [1, 2])]})
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["version"] == 1
    assert "merges" not in data
    assert data["sha256"] == "46a4804137d1dd49d3dc61229286d9630448c85cef7f9dda543a31229f803b3b"
    assert CompactionPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "damage",
    [
        {"from": [0], "onto": [9], "factor": [1.0]},
        {"from": [0, 2], "onto": [1], "factor": [1.0]},
        {"from": [], "onto": [], "factor": []},
        {"from": [0], "onto": [0], "factor": [1.0]},
        {"dim": 7},
        {"rows": [99]},
    ],
    ids=["index", "lengths", "empty", "itself", "dimension", "rows"],
)
def test_damaged_merges_change_nothing(damage: dict[str, Any]) -> None:
    model = model_of_three()
    plan = compact(model, torch.randn(X), measure=False).plan
    (merge,) = plan.merges["2.weight"]
    bad = Merge.from_json({**merge.to_json(), **damage})
    plan = CompactionPlan(
        plan.source, plan.cuts, plan.biases, plan.attributes, plan.replaced, {"2.weight": [bad]}
    )
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"damaged.*merges of 2\.weight"):
        plan.apply(model)
    assert fingerprint(model) == before


# ---------------------------------------------------------------------------------------------------
# Training goes on
# ---------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-3, t0=0),
}


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(X, generator=torch.Generator().manual_seed(1))).square().mean()


def without_the_carrier(name: str, tensor: Tensor) -> Tensor:
    """The filter of the carrier itself has its own gradient, to which the others add only from now on."""
    return tensor[1:] if name.startswith("0.") and tensor.dim() else tensor


def test_the_gradient_is_that_of_the_compact_model() -> None:
    """W' = W_j + sum_i (v_i / v_j) W_i has the gradient of W_j: it stays, and nothing is added to it."""
    model = model_of_three()
    loss_of(model).backward()
    result = compact(model, torch.randn(X), measure=False).model
    carried = {n: p.grad.clone() for n, p in result.named_parameters()}
    result.zero_grad()
    loss_of(result).backward()
    for name, parameter in result.named_parameters():
        got, expected = (without_the_carrier(name, g) for g in (carried[name], parameter.grad))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_holds_what_it_would_have_gathered_for_the_compact_model(
    name: str, inplace: bool
) -> None:
    """One step with a learning rate of 0 gathers the gradients of the model as it is."""
    model = model_of_three()
    small = compact(model, torch.randn(X), measure=False).model
    optimizers = []
    for trained in (model, small):
        optimizer = OPTIMIZERS[name](trained.parameters())
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.0) if name == "adamw" else 0.0
        optimizer.zero_grad()
        loss_of(trained).backward()
        optimizer.step()
        optimizers.append(optimizer)
    result = compact(model, torch.randn(X), optimizer=optimizers[0], inplace=inplace, measure=False).model
    for (n, a), b in zip(result.named_parameters(), small.parameters(), strict=True):
        for key, value in optimizers[1].state[b].items():
            if isinstance(value, Tensor):
                got, expected = (without_the_carrier(n, t) for t in (optimizers[0].state[a][key], value))
                torch.testing.assert_close(
                    got, expected, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
                )
    loss_of(result).backward()
    optimizers[0].step()


# ---------------------------------------------------------------------------------------------------
# Composed
# ---------------------------------------------------------------------------------------------------


def test_merges_compose_in_the_indices_of_the_source() -> None:
    source = {"weight": (4, 6, 1, 1)}
    first = CompactionPlan(
        source, {"weight": [Cut(1, [1, 2, 4, 5])]}, merges={"weight": [Merge(1, [0, 3], [2, 2], [0.5, 2.0])]}
    )
    second = CompactionPlan(
        {"weight": (4, 4, 1, 1)},
        {"weight": [Cut(1, [0, 2, 3])]},
        merges={"weight": [Merge(1, [1], [3], [3.0])]},
    )
    both = compose(first, second)
    assert both.merges["weight"][1] == Merge(1, [2], [5], [3.0])
    check_composed(both, first, second, torch.randn(4, 6, 1, 1))


def test_merges_of_groups_compose() -> None:
    """Three groups of two outputs and three inputs; the first plan drops the first group."""
    source = {"weight": (6, 3, 1, 1)}
    first = CompactionPlan(
        source,
        {"weight": [Cut(0, [2, 3, 4, 5]), Cut(1, groups=[[1, 2], [0, 2]])]},
        merges={"weight": [Merge(1, [0], [1], [0.5], [2, 3]), Merge(1, [1], [0], [0.25], [4, 5])]},
    )
    second = CompactionPlan(
        {"weight": (4, 2, 1, 1)},
        {"weight": [Cut(1, groups=[[0], [1]])]},
        merges={"weight": [Merge(1, [1], [0], [2.0], [0, 1]), Merge(1, [0], [1], [4.0], [2, 3])]},
    )
    both = compose(first, second)
    assert both.merges["weight"][2:] == [Merge(1, [2], [1], [2.0], [2, 3]), Merge(1, [0], [2], [4.0], [4, 5])]
    check_composed(both, first, second, torch.randn(6, 3, 1, 1))


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def check_composed(
    both: CompactionPlan, first: CompactionPlan, second: CompactionPlan, weight: Tensor
) -> None:
    model = Holder(weight)
    one = both.apply(copy.deepcopy(model)).weight
    two = second.apply(first.apply(model)).weight
    torch.testing.assert_close(one, two)
