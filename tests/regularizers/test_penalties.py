"""What the group regularizers penalise: against the formula written out with autograd, in float64 and in training."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_models import Residual
from torch import Tensor, nn

from ffr_ext.regularizers import OutInChannelLasso, Regularizer, ScaleLasso, SparseGroupLasso, prox
from ffr_ext.regularizers.prox import envelope

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)
Y = torch.tensor([0, 1])


def lenet() -> nn.Module:
    """Two convolutions and two linear layers behind a flatten, with scales that are not 1."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 4),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[1].weight.uniform_(-1, 1)
    return model


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


# --- the proximal form ----------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="factor: expected a number above 0"):
        other.grow(0.0)


# --- wrong arguments -------------------------------------------------------------------------------------

WRONG = [
    (lambda m: ScaleLasso(m, weight=-1.0), ValueError, "weight: expected a number of at least 0, got -1.0"),
    (lambda m: ScaleLasso(m, weight=math.inf), ValueError, "weight: expected a finite float"),
    (lambda m: ScaleLasso(m, weight="1"), TypeError, "weight: expected a float"),
    (
        lambda m: ScaleLasso(m, weight=1.0, form="proximal"),
        ValueError,
        "form: expected one of 'gradient', 'prox'",
    ),
    (lambda m: ScaleLasso(nn.Linear(2, 2), weight=1.0), ValueError, "ScaleLasso finds nothing to regularise"),
    (lambda m: ScaleLasso("m", weight=1.0), TypeError, "model: expected a torch.nn.Module, got str"),
    (lambda m: SparseGroupLasso("m", weight=1.0), TypeError, "model: expected a torch.nn.Module, got str"),
    (
        lambda m: SparseGroupLasso(nn.ReLU(), weight=1.0),
        ValueError,
        "SparseGroupLasso finds nothing to regularise",
    ),
    (lambda m: SparseGroupLasso(m, weight=1.0, sparse="l2"), ValueError, "sparse: expected one of 'l0'"),
    (lambda m: SparseGroupLasso(m, weight=1.0, groups="in"), ValueError, "groups: expected one of 'out'"),
    (
        lambda m: SparseGroupLasso(m, weight=1.0, groups="coupled"),
        ValueError,
        "example_inputs: groups='coupled' needs",
    ),
    (lambda m: SparseGroupLasso(m, weight=1.0, beta=0.0), ValueError, "beta: expected a number above 0"),
    (lambda m: SparseGroupLasso(m, weight=1.0, a=3.0), ValueError, "a: 'l0' has no such parameter"),
    (
        lambda m: SparseGroupLasso(m, weight=1.0, include_norm=1),
        TypeError,
        "include_norm: expected True or False",
    ),
    (lambda m: SparseGroupLasso(nn.LazyLinear(3), weight=1.0), ValueError, "run the model once"),
    (lambda m: OutInChannelLasso(m, X, weight=math.nan), ValueError, "weight: expected a finite float"),
    (lambda m: OutInChannelLasso(m, X, weight=1.0, scope="outer"), ValueError, "scope: expected one of"),
    (
        lambda m: OutInChannelLasso(m, X, weight=1.0, separated=None),
        TypeError,
        "separated: expected True or False",
    ),
    (
        lambda m: OutInChannelLasso(nn.Linear(8, 2).double(), X, weight=1.0),
        ValueError,
        "OutInChannelLasso finds nothing to regularise: no channel may leave it; 2 filters stay: an output",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments_are_named(make: Make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(lenet())


def test_a_gradient_that_cannot_be_added_to_is_refused_before_anything_changes() -> None:
    model = lenet()
    regularizer = OutInChannelLasso(model, X, weight=1.0)
    model[7].weight.grad = torch.zeros_like(model[7].weight).to_sparse()
    with pytest.raises(TypeError, match="expected a dense"):
        regularizer.add_gradients_()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["7.weight"]


def test_a_model_that_was_cut_since_is_refused_before_anything_changes() -> None:
    from ffr_ext import compact

    model = Residual().eval()
    regularizers = [
        ScaleLasso(model, weight=1.0),
        SparseGroupLasso(model, weight=1.0),
        OutInChannelLasso(model, X.float(), weight=1.0),
    ]
    with torch.no_grad():
        for parameter in model.blocks[0].bn1.parameters():
            parameter[:3] = 0
    compact(model, X.float(), inplace=True, measure=False)
    for regularizer in regularizers:
        with pytest.raises(ValueError, match="make them again"):
            regularizer.add_gradients_()
    assert all(p.grad is None for p in model.parameters())
