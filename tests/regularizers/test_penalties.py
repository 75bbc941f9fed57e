"""What the group regularizers penalise: against the formula written out with autograd, in float64 and in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lenet_double import X, Y, lenet
from pruning_models import Residual
from torch import Tensor, nn

from ffr_ext.regularizers import OutInChannelLasso, Regularizer, ScaleLasso, SparseGroupLasso
from ffr_ext.regularizers.prox import envelope


def norm(*parts: Tensor) -> Tensor:
    """The length of each of several vectors at once: along dim 1 of the parts."""
    return torch.cat([p.flatten(1) for p in parts], 1).square().sum(1).sqrt()


def slimming(model: nn.Module) -> Tensor:
    return 0.3 * model[1].weight.abs().sum()


def out_groups(model: nn.Module) -> Tensor:
    first = math.sqrt(27 + 1) * norm(model[0].weight, model[1].weight[:, None]).sum()
    others = [model[i] for i in (4, 7, 9)]
    return 0.3 * (first + sum(math.sqrt(m.weight[0].numel()) * norm(m.weight).sum() for m in others))


def paper_groups(model: nn.Module) -> Tensor:
    convolutions = sum(math.sqrt(model[i].weight[0].numel()) * norm(model[i].weight).sum() for i in (0, 4))
    linear = sum(math.sqrt(model[i].out_features) * norm(model[i].weight.t()).sum() for i in (7, 9))
    return 0.3 * (convolutions + linear)


def channels(model: nn.Module, with_norm: bool) -> list[Tensor]:
    """The lengths of all coupled groups, layer by layer."""
    gamma = [model[1].weight[:, None]] if with_norm else []
    return [
        norm(model[0].weight, model[4].weight.transpose(0, 1), *gamma),
        norm(model[4].weight, model[7].weight.t().reshape(5, 4 * 7)),
        norm(model[7].weight, model[9].weight.t()),
    ]


def coupled_groups(model: nn.Module) -> Tensor:
    sizes = (27 + 1 + 20, 24 + 28, 20 + 4)
    return 0.3 * sum(math.sqrt(n) * c.sum() for n, c in zip(sizes, channels(model, True), strict=True))


def out_in(model: nn.Module) -> Tensor:
    return 0.3 * torch.cat(channels(model, False)).sum()


def separated(model: nn.Module) -> Tensor:
    return 0.3 * sum(norm(model[i].weight).sum() for i in (0, 4, 7))


def single_weights(model: nn.Module, kind: str, **parameters: float) -> Tensor:
    return sum(envelope(kind, model[i].weight, 0.3, 2.0, **parameters) for i in (0, 4, 7, 9))


Make = Callable[[nn.Module], Any]
CASES: dict[str, tuple[Make, Callable[[nn.Module], Tensor]]] = {
    "slimming": (lambda m: ScaleLasso(m, weight=0.3), slimming),
    "out": (lambda m: SparseGroupLasso(m, weight=0.3, sparse=None, example_inputs=X), out_groups),
    "paper": (
        lambda m: SparseGroupLasso(m, weight=0.3, sparse=None, groups="paper", include_norm=False),
        paper_groups,
    ),
    "coupled": (
        lambda m: SparseGroupLasso(m, weight=0.3, sparse=None, groups="coupled", example_inputs=X),
        coupled_groups,
    ),
    "out-in": (lambda m: OutInChannelLasso(m, X, weight=0.3), out_in),
    "separated": (lambda m: OutInChannelLasso(m, X, weight=0.3, separated=True), separated),
}
for _kind, _parameters in {
    "l0": {},
    "l1": {},
    "transformed_l1": {"a": 2.0},
    "scad": {},
    "l1_l2": {"alpha": 0.5},
}.items():
    CASES[f"sparse {_kind}"] = (
        lambda m, k=_kind, p=_parameters: SparseGroupLasso(
            m, weight=0.3, sparse=k, beta=2.0, groups="paper", include_norm=False, **p
        ),
        lambda m, k=_kind, p=_parameters: paper_groups(m) + single_weights(m, k, **p),
    )


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_formula(name: str) -> None:
    make, formula = CASES[name]
    model = lenet()
    regularizer = make(model)
    assert isinstance(regularizer, Regularizer)
    expected = formula(model)
    expected.backward()
    truth = gradients(model)
    assert any(bool((g != 0).any()) for g in truth)
    torch.testing.assert_close(regularizer.loss().detach(), expected.detach(), rtol=1e-12, atol=0)
    for way in ("loss", "in place", "twice the loss"):
        model.zero_grad()
        if way == "in place":
            regularizer.add_gradients_()
        else:
            ((2 if way == "twice the loss" else 1) * regularizer.loss()).backward()
        for got, wanted in zip(gradients(model), truth, strict=True):
            factor = 2 if way == "twice the loss" else 1
            torch.testing.assert_close(got, factor * wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_added_to_what_is_there_and_scale_multiplies_them(name: str) -> None:
    make, _ = CASES[name]
    model = lenet()
    regularizer = make(model)
    regularizer.add_gradients_()
    once = gradients(model)
    F.cross_entropy(model(X), Y).backward()
    before = gradients(model)
    regularizer.scale = 0.25
    regularizer.add_gradients_()
    for got, b, o in zip(gradients(model), before, once, strict=True):
        torch.testing.assert_close(got, b + 0.25 * o, rtol=1e-12, atol=1e-12)
    assert float(regularizer.loss()) == pytest.approx(0.25 * float(make(model).loss()))


@pytest.mark.parametrize("name", CASES)
def test_it_does_nothing_while_it_is_off(name: str) -> None:
    make, _ = CASES[name]
    model = lenet()
    kept = copy.deepcopy(model.state_dict())
    for switch in ({"enabled": False}, {"scale": 0.0}):
        regularizer = make(model)
        for key, value in switch.items():
            setattr(regularizer, key, value)
        regularizer.add_gradients_()
        regularizer.step()
        assert float(regularizer.loss()) == 0
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_groups_of_zeros_have_no_gradient_and_nan_is_shown(name: str) -> None:
    make, _ = CASES[name]
    model = lenet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    regularizer = make(model)
    regularizer.add_gradients_()
    assert all(not bool(g.any()) for g in gradients(model))
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = math.nan
        model[1].weight[1] = math.nan
    regularizer.add_gradients_()
    assert any(bool(g.isnan().any()) for g in gradients(model))
    assert math.isnan(float(regularizer.loss()))


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused_and_changed_weights_too(name: str) -> None:
    make, _ = CASES[name]
    model = lenet()
    loss = make(model).loss()
    (gradient,) = torch.autograd.grad(
        loss, model[1].weight if name == "slimming" else model[4].weight, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()
    loss = make(model).loss()
    with torch.no_grad():
        model[4].weight.mul_(2)
        model[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["slimming", "out", "sparse l0", "sparse scad"])
def test_smaller_dtypes_have_the_gradient_of_their_weights_rounded_once(
    name: str, dtype: torch.dtype
) -> None:
    make, formula = CASES[name]
    model = lenet().to(dtype)
    exact = copy.deepcopy(model).double()
    formula(exact).backward()
    regularizer = make(model) if name != "out" else SparseGroupLasso(model, weight=0.3, sparse=None)
    regularizer.add_gradients_()
    for got, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        if wanted.grad is not None:
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=2 * rounding, atol=2e-6)


def test_terms_name_the_layers_and_add_up() -> None:
    model = lenet()
    for name, (make, formula) in CASES.items():
        regularizer = make(model)
        regularizer.scale = 3.0
        terms = regularizer.terms()
        assert all(t.dim() == 0 and not t.requires_grad for t in terms.values())
        if not name.startswith("sparse"):
            assert float(sum(terms.values())) == pytest.approx(float(formula(model).detach()))
    assert list(ScaleLasso(model, weight=1.0).terms()) == ["1"]
    assert list(OutInChannelLasso(model, X, weight=1.0).terms()) == ["0", "4", "7"]
    assert list(SparseGroupLasso(model, weight=1.0).terms()) == ["0", "4", "7", "9"]


# --- what is shared, frozen, or coupled ------------------------------------------------------------------


def test_tied_weights_and_scales_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[2].weight, model[3].weight = model[0].weight, model[1].weight
    assert float(ScaleLasso(model, weight=1.0).loss()) == 4
    lasso = SparseGroupLasso(model, weight=1.0, sparse=None, include_norm=False)
    torch.testing.assert_close(float(lasso.loss()), float(2 * norm(model[0].weight.detach()).sum()))


def test_frozen_weights_are_counted_and_left_alone() -> None:
    model = lenet()
    model[4].weight.requires_grad_(False)
    regularizer = OutInChannelLasso(model, X, weight=0.3)
    torch.testing.assert_close(regularizer.loss().detach(), out_in(model).detach())
    regularizer.add_gradients_()
    assert model[4].weight.grad is None
    assert model[0].weight.grad is not None
    assert {id(p) for p in regularizer.parameters()} == {id(model[i].weight) for i in (0, 7, 9)}


def test_out_in_is_least_where_both_halves_of_a_channel_are_as_large() -> None:
    """ReLU networks compute the same when scale moves from a filter to what reads it; the penalty sees through that,
    and the penalty of filters alone does not."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        balance = (norm(model[2].weight.t()) / norm(model[0].weight)).sqrt()

    def rescaled(factor: Tensor) -> nn.Module:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.mul_(factor[:, None])
            other[0].bias.mul_(factor)
            other[2].weight.div_(factor)
        torch.testing.assert_close(other(x), model(x))
        return other

    balanced = rescaled(balance)
    least = float(OutInChannelLasso(balanced, x, weight=1.0).loss())
    halves = (2 * norm(model[0].weight) * norm(model[2].weight.t())).sqrt().sum()
    assert least == pytest.approx(float(halves))
    for factor in (0.5, 0.9, 1.1, 3.0):
        other = rescaled(balance * factor)
        assert float(OutInChannelLasso(other, x, weight=1.0).loss()) > least
        alone = [float(OutInChannelLasso(m, x, weight=1.0, separated=True).loss()) for m in (other, balanced)]
        assert alone[0] == pytest.approx(factor * alone[1])


def test_channels_that_an_addition_couples_are_one_group() -> None:
    model = Residual()
    with_stream = OutInChannelLasso(model, X.float(), weight=1.0, scope="all")
    inner = OutInChannelLasso(model, X.float(), weight=1.0)
    assert len(with_stream.groups) == 8 + 2 * 12
    assert len(inner.groups) == 2 * 12
    assert list(with_stream.terms()) == ["stem.0", "blocks.0.conv1", "blocks.1.conv1"]


def test_the_default_device_does_not_matter() -> None:
    model = lenet()
    with torch.device("meta"):
        for make, formula in CASES.values():
            regularizer = make(model)
            regularizer.add_gradients_()
            torch.testing.assert_close(
                regularizer.loss().detach(), formula(model).detach(), rtol=1e-12, atol=0
            )
            regularizer.terms()


# --- the split of the published code -------------------------------------------------------------------


def train_with_copies(model: nn.Module, steps: int) -> None:
    """The published iteration: a copy U of the weights, a step on W with U fixed, then U = prox(W)."""
    layers = [model[i] for i in (0, 4, 7, 9)]
    weight, beta = 2e-3, 0.05
    threshold = math.sqrt(2 * weight / beta)
    copies = [torch.where(m.weight.detach().abs() <= threshold, 0.0, m.weight.detach()) for m in layers]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X.to(layers[0].weight.dtype)), Y).backward()
        for layer, copied in zip(layers, copies, strict=True):
            layer.weight.grad.add_(beta * (layer.weight.detach() - copied))
        optimizer.step()
        for layer, copied in zip(layers, copies, strict=True):
            copied.copy_(torch.where(layer.weight.detach().abs() <= threshold, 0.0, layer.weight.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_capped_ridge_is_the_split_of_the_published_code_bit_for_bit(dtype: torch.dtype) -> None:
    model = lenet().to(dtype)
    x = X.to(dtype)
    published, ours, by_loss = (copy.deepcopy(model) for _ in range(3))
    train_with_copies(published, 100)
    for trained, in_place in ((ours, True), (by_loss, False)):
        # With form="prox" the groups are left to step(), so that the gradient is that of single weights alone.
        lasso = SparseGroupLasso(trained, weight=2e-3, beta=0.05, include_norm=False, form="prox")
        optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(trained(x), Y)
            (loss if in_place else loss + lasso.loss()).backward()
            if in_place:
                lasso.add_gradients_()
            optimizer.step()
    for a, b, c in zip(published.parameters(), ours.parameters(), by_loss.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a)
    weights = ours[7].weight.detach()
    assert not torch.equal(weights, model[7].weight)


def test_beta_grows_and_is_resumed() -> None:
    lasso = SparseGroupLasso(lenet(), weight=0.04)
    assert lasso.beta == pytest.approx(1.0)
    lasso.grow(1.25)
    lasso.scale = 0.5
    assert lasso.beta == pytest.approx(1.25)
    other = SparseGroupLasso(lenet(), weight=0.04)
    other.load_state_dict(lasso.state_dict())
    assert (other.beta, other.scale) == (lasso.beta, 0.5)
    with pytest.raises(ValueError, match="'scale' and 'beta'"):
        other.load_state_dict({"scale": 1.0})
    with pytest.raises(ValueError, match=r"state\['enabled'\]: expected True or False, got None"):
        other.load_state_dict({**lasso.state_dict(), "scale": 0.25, "enabled": None})
    assert (other.scale, other.enabled) == (0.5, True), "nothing half-done"
    with pytest.raises(ValueError, match="factor: expected a number above 0"):
        other.grow(0.0)
