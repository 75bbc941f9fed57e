"""`synthesize`: generations drawn with the stated probabilities, cut exactly, with what trains them carried over."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_models import Residual, fingerprint
from torch import nn

from ffr_ext.pruning import channel_groups, synthesize
from ffr_ext.pruning.graph.groups.survival import channel_survival

X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


def residual() -> nn.Module:
    """Channels of different scales: at the start all are as strong as the strongest, and survive."""
    model = Residual().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0, 1)
    return model


def wide(width: int = 40) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 4),
    ).eval()


def test_channels_survive_with_the_probability_of_their_strength() -> None:
    """Over many draws the share kept is the mean probability, within three standard deviations."""
    model = wide()
    groups = channel_groups(model, X)
    energies = groups.energies(include_norm=False).double()
    expected = torch.cat([0.7 * torch.exp((e / e.max()).sqrt() - 1) for e in energies.split(40)])
    survival = channel_survival(groups, 0.7)
    torch.testing.assert_close(survival, expected)
    generator = torch.Generator().manual_seed(1)
    draws = 12
    kept = 0
    for _ in range(draws):
        child = synthesize(model, X, environment=0.7, generator=generator, measure=False)
        kept += child.model[0].out_channels + child.model[2].out_channels
    spread = math.sqrt(float((survival * (1 - survival)).sum()) * draws)
    assert abs(kept - draws * float(survival.sum())) < 3 * spread


def test_behind_norms_the_effective_scale_decides_and_not_the_size_of_filters() -> None:
    model = Residual().eval()
    with torch.no_grad():
        model.blocks[0].bn1.weight.copy_(torch.linspace(0.1, 1, 12))
        model.blocks[0].bn1.running_var.uniform_(0.5, 2)
    before = channel_survival(channel_groups(model, X), 1.0)
    bn = model.blocks[0].bn1
    scale = bn.weight.detach().double() * (bn.running_var / (bn.running_var + bn.eps)).double().sqrt()
    torch.testing.assert_close(before[:12], torch.exp(scale / scale.max() - 1), rtol=1e-6, atol=0)
    with torch.no_grad():
        model.blocks[0].conv1.weight.mul_(torch.rand(12)[:, None, None, None])
    torch.testing.assert_close(channel_survival(channel_groups(model, X), 1.0), before)


def test_synapses_survive_by_their_size_and_the_dead_stay_dead() -> None:
    """Also with a generator of the seed that the weights were made with."""
    torch.manual_seed(0)
    model = wide()
    before = fingerprint(model)
    generator = torch.Generator().manual_seed(0)
    child = synthesize(model, X, level="synapse", generator=generator, measure=False)
    assert fingerprint(model) == before
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert set(child.masks) == {"0.weight", "2.weight", "5.weight"}
    for name, mask in child.masks.items():
        weight = child.model.get_parameter(name)
        assert weight.shape == mask.shape
        assert torch.equal(weight != 0, mask)
        share = torch.exp(first[name].abs() / first[name].abs().max() - 1)
        assert abs(float(mask.double().mean()) - float(share.mean())) < 3 * 0.5 / math.sqrt(mask.numel())
    second = synthesize(child.model, X, level="synapse", generator=generator, measure=False)
    for name, mask in second.masks.items():
        old = child.masks[name]
        if old.shape == mask.shape:
            assert not bool((mask & ~old).any())
    assert (
        float(second.masks["2.weight"].double().mean())
        < 0.6 * float(child.masks["2.weight"].double().mean()) + 0.1
    )


@pytest.mark.parametrize("level", ["channel", "synapse"])
@pytest.mark.parametrize("make", [wide, residual], ids=["plain", "residual"])
def test_the_offspring_computes_what_the_parent_does_without_the_dead(make: Any, level: str) -> None:
    model = make()
    child = synthesize(model, X, level=level, generator=torch.Generator().manual_seed(2), measure=False)
    assert child.report.max_error <= 1e-5 * max(child.report.max_output, 1)
    assert not child.plan.is_empty or level == "synapse"
    child.model.train()
    F.cross_entropy(child.model(X), Y).backward()


def test_seeds_decide_and_every_layer_keeps_a_channel() -> None:
    model = wide()
    digests = [
        synthesize(model, X, generator=torch.Generator().manual_seed(s), measure=False).plan.digest()
        for s in (5, 5, 6)
    ]
    assert digests[0] == digests[1] != digests[2]
    assert (
        synthesize(model, X, measure=False).plan.digest() == synthesize(model, X, measure=False).plan.digest()
    )
    tiny = synthesize(model, X, environment=1e-9, measure=False).model
    assert (tiny[0].out_channels, tiny[2].out_channels) == (1, 1)


def test_the_default_device_does_not_matter() -> None:
    model = wide(8)
    for level in ("channel", "synapse"):
        expected = synthesize(model, X, level=level, measure=False)
        with torch.device("meta"):
            found = synthesize(model, X, level=level, measure=False)
        assert fingerprint(found.model) == fingerprint(expected.model)


def test_the_best_of_several_offspring_is_kept() -> None:
    model = wide()
    seen: list[float] = []

    def loss(child: nn.Module) -> float:
        with torch.no_grad():
            seen.append(float(F.cross_entropy(child(X), Y)))
        return seen[-1]

    best = synthesize(model, X, offspring=4, evaluate=loss, measure=False)
    assert len(seen) == 4
    assert len(set(seen)) > 1
    assert loss(best.model) == min(seen)


@pytest.mark.parametrize("level", ["channel", "synapse"])
@pytest.mark.parametrize("inherit", [True, False])
def test_the_optimizer_goes_on_without_momentum_for_the_dead(level: str, inherit: bool) -> None:
    model = wide().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    child = synthesize(model, X, level=level, optimizer=optimizer, inherit=inherit, measure=False)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in child.model.parameters()}
    buffers = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
    assert bool(buffers) == inherit
    for name, mask in child.masks.items():
        weight = child.model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        if inherit:
            assert not bool(optimizer.state[weight]["momentum_buffer"][~mask].any())
    if not inherit:
        same = child.model[5].weight
        assert same.shape != old["5.weight"].shape or not torch.equal(same, old["5.weight"])
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(child.model(X), Y).backward()
        optimizer.step()
        child.keep_dead_()
    for name, mask in child.masks.items():
        assert not bool(child.model.get_parameter(name)[~mask].any())


def test_newborn_weights_depend_on_the_seed_alone_and_leave_the_global_generator() -> None:
    model = wide()
    state = torch.random.get_rng_state()
    first, second = (synthesize(model, X, inherit=False, measure=False).model for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fingerprint(first) == fingerprint(second)
    torch.manual_seed(99)
    assert fingerprint(synthesize(model, X, inherit=False, measure=False).model) == fingerprint(first)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"environment": 0.0}, ValueError, "environment: expected a finite number above 0"),
        ({"environment": "1"}, TypeError, "environment: expected a number"),
        ({"level": "cluster"}, ValueError, "level: expected one of 'channel', 'synapse'"),
        ({"scope": "outer"}, ValueError, "scope: expected one of"),
        ({"inherit": 1}, TypeError, "inherit: expected True or False"),
        ({"offspring": 0}, ValueError, "offspring: expected a whole number"),
        ({"offspring": 2}, ValueError, "evaluate: several offspring need a function"),
        ({"generator": 0}, TypeError, "generator: expected a torch.Generator"),
        ({"optimizer": "sgd"}, TypeError, "optimizer: expected"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        synthesize(wide(8), X, **options)


def test_a_model_with_nothing_to_draw_or_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="no channel that may leave: an output of the model"):
        synthesize(nn.Linear(8, 2), torch.randn(2, 8))
    for level in ("channel", "synapse"):
        model = wide(8)
        with torch.no_grad():
            model[2].weight[0] = math.inf
        with pytest.raises(ValueError, match="finite"):
            synthesize(model, X, level=level)
