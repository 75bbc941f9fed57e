"""`Stress`: weak parts are attenuated around forward and backward pass, and the weights are restored bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_models import Residual, fingerprint
from torch import Tensor, nn

from ffr_ext.regularizers import Regularizer, Stress

X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


def plain() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    with torch.no_grad():  # what reads the channels likewise
        model[2].weight.mul_(torch.linspace(0.01, 1, 8)[:, None, None])
        model[5].weight.mul_(torch.linspace(0.01, 1, 8).repeat_interleave(16))
    return uneven(model)


def uneven(model: nn.Module) -> nn.Module:
    """Channels of different strengths: those as strong as the strongest always survive."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                size = module.weight.shape[0]
                module.weight.mul_(torch.linspace(0.01, 1, size).view(-1, *[1] * (module.weight.dim() - 1)))
    return model


def with_norms() -> nn.Module:
    return uneven(Residual())


def step(model: nn.Module, x: Tensor = X) -> Tensor:
    loss = F.cross_entropy(model(x), Y)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("level", ["channel", "synapse"])
@pytest.mark.parametrize("make", [plain, with_norms], ids=["plain", "norms"])
def test_weights_are_restored_bit_for_bit(make: Any, level: str) -> None:
    model = make()
    before = {n: p.clone() for n, p in model.named_parameters()}
    stress = Stress(model, X, attenuation=0.3, every=1, level=level)
    assert isinstance(stress, Regularizer)
    with stress:
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert changed
        step(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="oops"), stress:
        raise RuntimeError("oops")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("level", ["channel", "synapse"])
@pytest.mark.parametrize("make", [plain, with_norms], ids=["plain", "norms"])
def test_an_attenuation_of_one_leaves_training_as_it_is(make: Any, level: str) -> None:
    with_stress = make()
    without = copy.deepcopy(with_stress)
    stress = Stress(with_stress, X, attenuation=1.0, every=1, level=level)
    for model in (with_stress, without):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            if model is with_stress:
                with stress:
                    step(model, X + torch.randn(1))
            else:
                step(model, X + torch.randn(1))
            optimizer.step()
    assert fingerprint(with_stress) == fingerprint(without)


@pytest.mark.parametrize("level", ["channel", "synapse"])
def test_the_loss_is_that_of_the_attenuated_network_as_a_function_of_the_weights(level: str) -> None:
    """Gradients by the chain rule: d L(m w) / dw = m L'(m w), written out with functional_call."""
    model = plain().double()
    x = X.double()
    stress = Stress(model, x, attenuation=0.4, every=1, level=level)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with stress:
        masks = {
            n: torch.where(before[n] == 0, 1.0, p.detach() / before[n]) for n, p in model.named_parameters()
        }
        loss = F.cross_entropy(model(x), Y)
        loss.backward()
    weights = {n: p.clone().requires_grad_() for n, p in before.items()}
    truth = F.cross_entropy(
        torch.func.functional_call(model, {n: masks[n] * w for n, w in weights.items()}, x), Y
    )
    grads = torch.autograd.grad(truth, list(weights.values()))
    torch.testing.assert_close(loss, truth)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    values = torch.cat([m.flatten() for m in (masks["0.weight"], masks["2.weight"])])
    assert 0.1 < float((values < 0.9).double().mean()) < 0.9
    assert bool(((values - 0.4).abs() < 1e-9).logical_or((values - 1).abs() < 1e-9).all())


def test_a_channel_that_is_attenuated_gives_that_much_less() -> None:
    """In its filter and bias without a norm, in scale and shift with one, whose statistics stay untouched."""
    norm = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    for model, layer in ((plain(), 1), (norm, 2)):
        fresh, at_rest = copy.deepcopy(model), copy.deepcopy(model)
        expected = at_rest[: layer + 1](X)
        stress = Stress(fresh, X, attenuation=0.25, every=1)
        with stress, torch.no_grad():
            got = fresh[: layer + 1](X)
        ratios = [
            float((got[:, c] / expected[:, c]).nanmean()) for c in range(8) if bool(expected[:, c].any())
        ]
        assert {round(r, 4) for r in ratios} == {0.25, 1.0}
        for (name, a), b in zip(fresh.named_buffers(), at_rest.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=name)


def test_every_second_batch_is_stressed_and_the_draws_differ() -> None:
    model = plain()
    stress = Stress(model, X, attenuation=0.0, every=2)
    changed = []
    for _ in range(6):
        before = model[0].weight.detach().clone()
        with stress:
            changed.append((model[0].weight != before).flatten(1).any(1))
    assert [bool(c.any()) for c in changed[::2]] == [False] * 3
    assert all(bool(c.any()) for c in changed[1::2])
    assert not torch.equal(changed[1], changed[3]) or not torch.equal(changed[3], changed[5])


def test_gradients_of_micro_batches_are_added_up() -> None:
    model = plain()
    reference = copy.deepcopy(model)
    step(reference)
    stress = Stress(model, X, attenuation=0.5, every=2)
    with stress:
        step(model)
    first = [p.grad.clone() for p in model.parameters()]
    for got, wanted in zip(first, reference.parameters(), strict=True):
        assert torch.equal(got, wanted.grad)
    with stress:
        step(model)
    alone = copy.deepcopy(reference)
    alone.zero_grad()
    with Stress(alone, X, attenuation=0.5, every=1):
        step(alone)
    for got, a, b in zip(model.parameters(), first, alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, a + b.grad)


def test_scale_and_enabled_drive_it() -> None:
    stress = Stress(plain(), X, attenuation=0.6)
    assert stress.active_attenuation == pytest.approx(0.6)
    stress.scale = 0.5
    assert stress.active_attenuation == pytest.approx(0.8)
    stress.scale = 5.0
    assert stress.active_attenuation == 0
    stress.enabled = False
    assert stress.active_attenuation == 1
    assert float(stress.loss()) == 0
    stress.add_gradients_()
    stress.step()


def test_a_resumed_run_draws_what_the_first_would_have() -> None:
    def draws(stress: Stress, count: int) -> list[Tensor]:
        drawn = []
        for _ in range(count):
            with stress:
                drawn.append(stress.model[0].weight.detach().clone())
        return drawn

    model = plain()
    stress = Stress(model, X, generator=torch.Generator().manual_seed(7))
    draws(stress, 3)
    state = copy.deepcopy(stress.state_dict())
    expected = draws(stress, 4)
    resumed = Stress(model, X)
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(draws(resumed, 4), expected, strict=True))
    with pytest.raises(ValueError, match="state: expected what state_dict"):
        resumed.load_state_dict({"scale": 1.0})


def test_a_compiled_model_sees_the_attenuated_weights() -> None:
    model = plain()
    stress = Stress(model, X, attenuation=0.2, every=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(compiled)
    model.zero_grad()
    generator = stress.generator.get_state()
    with stress:
        loss = step(compiled)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    stress.generator.set_state(generator)
    with stress:
        torch.testing.assert_close(step(model), loss)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attenuation": 1.5}, ValueError, "attenuation: expected a number in 0 .. 1"),
        ({"attenuation": math.nan}, ValueError, "attenuation: expected a finite float"),
        ({"every": 0}, ValueError, "every: expected a whole number of at least 1"),
        ({"level": "layer"}, ValueError, "level: expected one of 'channel', 'synapse'"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Stress(plain(), X, **options)


def test_weights_that_are_not_finite_are_refused_and_nothing_changes() -> None:
    for level in ("channel", "synapse"):
        model = plain()
        with torch.no_grad():
            model[2].weight[0, 0, 0, 0] = math.nan
        kept = model[0].weight.detach().clone()
        stress = Stress(model, X, every=1, level=level)
        with pytest.raises(ValueError, match="finite"):
            stress.before_forward()
        assert torch.equal(model[0].weight, kept)
    with pytest.raises(ValueError, match="Stress finds nothing to regularise"):
        Stress(nn.Linear(8, 2), torch.randn(2, 8))
    stress = Stress(plain(), X, attenuation=0.5, every=1)
    stress.before_forward()
    with pytest.raises(RuntimeError, match="twice"):
        stress.before_forward()
