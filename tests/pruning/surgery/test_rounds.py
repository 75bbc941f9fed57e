"""A second compaction removes nothing more: what a first cut makes possible is part of the same plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pruning_models import absorbing
from random_nets import RandomNet
from torch import nn

from ffr_ext import CompactionPlan, compact
from ffr_ext.pruning.surgery import search
from ffr_ext.pruning.surgery.compose import CannotCompose, compose
from ffr_ext.pruning.surgery.cuts import Cut

X = (2, 3, 5, 5)


def net(steps: list[tuple[Any, ...]], head: int, pooled: bool = False, **layers: nn.Module) -> nn.Module:
    front = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    return RandomNet(steps, layers, nn.Sequential(*front, nn.Flatten(), nn.Linear(head, 3))).eval()


def kill(layer: Any, filters: Any, biases: Any = ()) -> Any:
    with torch.no_grad():
        layer.weight[filters] = 0
        if layer.bias is not None:
            layer.bias[list(biases)] = 0
    return layer


def conv(i: int, o: int, k: int, bias: bool = True, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=bias)


def grouped_to_depthwise() -> nn.Module:
    """The one output kept and the one input kept lie in different groups: one channel per group stays, and
    that is depthwise."""
    model = net(
        [("layer", "a", 0), ("layer", "g", 1), ("layer", "unread", 1), ("add", 2, 2)],
        200,
        a=kill(conv(3, 8, 3, bias=False), slice(None)),
        g=kill(conv(8, 8, 3, groups=2), [0, 2, 3, 4, 7], [0, 3, 7]),
        unread=conv(8, 8, 1, bias=False),
    )
    with torch.no_grad():
        model.layers["g"].weight[:4] *= 0.1  # the strongest output is in the second group
    return model


def kept_for_a_size_then_needed() -> nn.Module:
    """One channel is kept for min_channels before another turns out to be needed, as a constant."""
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-1, 1, 8))
        norm.weight[:] = 0
        norm.bias[[1, 3]] = 0
    first = conv(3, 8, 3, bias=False)
    with torch.no_grad():
        first.weight[1] *= 10  # the strongest is one that is not needed
    return net(
        [("layer", "a", 0), ("layer", "norm", 1), ("layer", "b", 2), ("layer", "c", 1)],
        100,
        a=first,
        norm=norm,
        b=conv(8, 8, 3, bias=False),
        c=kill(conv(8, 4, 1), slice(None)),
    )


def branch_dead_after_the_cut() -> nn.Module:
    """The only live filter of a residual branch leaves with its group of the norm: what is left of the branch
    is 0."""
    norm = nn.GroupNorm(2, 8)
    with torch.no_grad():
        norm.weight[4:] = 0
        norm.bias.zero_()
    return net(
        [("layer", "a", 0), ("layer", "norm", 1), ("layer", "branch", 1), ("add", 2, 3), ("mul", 2, 4)],
        8,
        pooled=True,
        a=conv(3, 8, 3),
        norm=norm,
        branch=kill(conv(8, 8, 1, bias=False), slice(0, 7)),
    )


@pytest.mark.parametrize(
    ("make", "strict"),
    [
        (grouped_to_depthwise, True),
        (grouped_to_depthwise, False),
        (branch_dead_after_the_cut, True),
        (branch_dead_after_the_cut, False),
    ],
)
def test_what_a_cut_makes_possible_is_in_the_same_plan(
    make: Any, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(X)
    with monkeypatch.context() as context:
        context.setattr(search, "MAX_ROUNDS", 1)
        one_round = compact(model, x, strict=strict, measure=False)
    result = compact(model, x, strict=strict, measure=False)
    assert result.report.parameters[1] < one_round.report.parameters[1], "the case needs a second round"
    assert compact(result.model, x, strict=strict, measure=False).plan.is_empty
    if strict:
        assert (result.model(x) - model(x)).abs().max() < 1e-5
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    result.plan.apply(other).load_state_dict(result.model.state_dict())
    assert torch.equal(other(x), result.model(x))
    assert torch.equal(result.plan.apply(model)(x), result.model(x))


def test_a_channel_kept_for_a_size_that_another_fills_leaves_in_the_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One traced graph is enough for it."""
    torch.manual_seed(0)
    model, x = kept_for_a_size_then_needed(), torch.randn(X)
    traces = []
    original = search.trace
    monkeypatch.setattr(search, "trace", lambda *a: traces.append(1) or original(*a))
    result = compact(model, x, measure=False)
    assert len(traces) == 1
    kept = result.plan.cuts["layers.a.weight"][0].keep
    assert kept is not None
    assert list(kept) == [0]  # the largest constant, which carries the others; 1 and 3 are 0
    assert compact(result.model, x, measure=False).plan.is_empty
    assert (result.model(x) - model(x)).abs().max() < 1e-5


def test_the_report_counts_all_rounds() -> None:
    torch.manual_seed(0)
    result = compact(grouped_to_depthwise(), torch.randn(X), measure=False)
    removed = {s.tensors[0]: (s.channels, s.removed) for s in result.report.sets}
    assert removed["layers.a.weight[0]"] == (8, 7)
    assert result.model.layers["a"].out_channels == 1


def test_one_traced_graph_is_enough_for_most_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept for a size, and no coupling changes: the second export would be for nothing."""
    traces = []
    original = search.trace
    monkeypatch.setattr(search, "trace", lambda *a: traces.append(1) or original(*a))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    kill(model[0], [1, 2], range(8))
    assert not compact(model, torch.randn(X), measure=False).plan.is_empty
    assert len(traces) == 1


@pytest.mark.parametrize("second_dead", [[2, 3], [0, 1, 2], [1, 4]], ids=str)
def test_composed_plans_do_what_both_do(second_dead: list[int]) -> None:
    """Groups, biases that exist and a bias that the first plan makes."""
    torch.manual_seed(0)
    model, x = absorbing(), torch.randn(2, 3, 8, 8)
    first = compact(model, x, measure=False)
    smaller = first.model
    with torch.no_grad():
        smaller[0].weight[second_dead] = 0
        smaller[0].bias[second_dead] = 0.5
        smaller[2].weight[second_dead] = 0
    second = compact(smaller, x, measure=False)
    assert second.plan.cuts
    one = compose(first.plan, second.plan).apply(copy.deepcopy(model))
    two = second.plan.apply(first.plan.apply(copy.deepcopy(model)))
    assert {n: t.shape for n, t in one.state_dict().items()} == {
        n: t.shape for n, t in two.state_dict().items()
    }
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one(x), two(x))


def test_cuts_of_groups_compose() -> None:
    """Four groups of three inputs; the first plan drops the second group, the second one the first."""
    source = {"weight": (8, 3, 1, 1)}
    first = CompactionPlan(
        source, {"weight": [Cut(0, [0, 1, 4, 5, 6, 7]), Cut(1, groups=[[0, 2], [1, 2], [0, 1]])]}
    )
    between = {"weight": (6, 2, 1, 1)}
    second = CompactionPlan(between, {"weight": [Cut(0, [2, 5]), Cut(1, groups=[[1], [0]])]})
    assert compose(first, second).cuts["weight"] == [Cut(0, [4, 7]), Cut(1, groups=[[2], [0]])]


def test_plans_of_other_tensors_do_not_compose() -> None:
    first = CompactionPlan({"a": (4,)})
    with pytest.raises(CannotCompose, match="b is not in the source"):
        compose(first, CompactionPlan({"b": (4,)}, {"b": [Cut(0, [0])]}))
