"""What the two tasks compute, checked against formulas by hand and theorems."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from structured_nets import Residual, X, batch, both, convolutional, mlp
from torch import Tensor, nn
from torch.func import functional_call

from ffr_ext.structured import StructuredOutput

# --- the formulas ---------------------------------------------------------------------------------


def test_both_terms_equal_the_formulas() -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model, input=0.5, output=3.0)
    with torch.no_grad():
        for bias in tasks.parameters():
            bias.normal_()
    first, second, last = model[0], model[2], model[6]
    d0, d1 = tasks.mirrors["input"].biases
    code = F.softplus(second(torch.sigmoid(first(x))))
    again_x = torch.sigmoid(torch.sigmoid(code @ second.weight + d1) @ first.weight + d0)
    (d,) = tasks.mirrors["output"].biases
    again_y = torch.tanh(last(torch.tanh(y @ last.weight + d)))
    j_in, j_out = ((again_x - x) ** 2).mean(), ((again_y - y) ** 2).mean()
    # The mirror's biases are listed in the order of the chain's layers.
    assert (d0.shape, d1.shape, d.shape) == ((6,), (5,), (3,))
    torch.testing.assert_close(tasks.loss(x, y), 0.5 * j_in + 3 * j_out, rtol=1e-12, atol=0)
    torch.testing.assert_close(tasks.terms(), {"input": j_in.detach(), "output": j_out.detach()})
    assert not any(term.requires_grad for term in tasks.terms().values())
    torch.testing.assert_close(tasks.reconstruct_input(x), again_x)
    torch.testing.assert_close(tasks.decode(tasks.encode_output(y)), again_y)


def test_each_task_runs_alone_on_its_own_number_of_rows() -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model)
    together = tasks.loss(x, y)
    torch.testing.assert_close(tasks.loss(x=x) + tasks.loss(y=y), together)
    tasks.loss(y=y[:1])
    assert list(tasks.terms()) == ["output"]


def test_the_linear_output_task_is_least_at_the_principal_subspace_and_worth_the_other_eigenvalues() -> None:
    """Baldi and Hornik's theorem in the tied form: mean over elements of ||W W^T y - y||^2."""
    y = torch.randn(200, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(y.T @ y / len(y))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 7, bias=False)).double()
    tasks = StructuredOutput(model, last=model[1:])
    with torch.no_grad():
        model[1].weight.copy_(vectors[:, -3:])
    least = tasks.loss(y=y)
    torch.testing.assert_close(least, values[:-3].sum() / 7, rtol=1e-12, atol=1e-12)
    for _ in range(20):
        with torch.no_grad():
            model[1].weight.copy_(torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q)
        assert tasks.loss(y=y) > least


def test_a_shared_weight_gets_the_gradients_of_both_its_uses() -> None:
    """Untied, one weight gets that of the layer and the other that of the mirror; tied, their sum."""
    tied_model, (x, y) = mlp(), batch()
    free_model = copy.deepcopy(tied_model)
    tied, free = both(tied_model), both(free_model, mirror="free")
    torch.testing.assert_close(free.loss(x, y), tied.loss(x, y), rtol=0, atol=0)
    tied.loss(x, y).backward()
    free.loss(x, y).backward()
    of_mirrors = {0: free.mirrors["input"].weights[0], 2: free.mirrors["input"].weights[1]}
    of_mirrors[6] = free.mirrors["output"].weights[0]
    for index, own in of_mirrors.items():
        total = free_model[index].weight.grad + own.grad
        torch.testing.assert_close(tied_model[index].weight.grad, total, rtol=1e-12, atol=1e-15)
    for a, b in zip(tied.parameters(), (p for n, p in free.named_parameters() if "biases" in n), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


class Wrapped(nn.Module):
    """The tasks' loss as a function of all parameters."""

    def __init__(self, model: nn.Module, tasks: StructuredOutput) -> None:
        super().__init__()
        self.model_of_tasks, self.tasks = model, tasks

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.tasks.loss(x, y)


def test_gradients_are_those_of_finite_differences_also_under_functional_call() -> None:
    model, (x, y) = mlp(), batch()
    wrapped = Wrapped(model, both(model, input=0.7, output=1.3))
    names = [
        name for name, _ in wrapped.named_parameters() if ".4." not in name
    ]  # the link is not in the loss
    values = tuple(wrapped.get_parameter(name).detach().clone().requires_grad_() for name in names)

    def loss(*given: Tensor) -> Tensor:
        result: Tensor = functional_call(wrapped, dict(zip(names, given, strict=True)), (x, y))
        return result

    assert torch.autograd.gradcheck(loss, values)


def test_weights_of_zero_change_no_bit_of_a_gradient() -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model, input=0.0, output=0.0)
    supervised = F.mse_loss(model(x), y[:5])
    supervised.backward(retain_graph=True)
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = tasks.loss(x, y)
    (F.mse_loss(model(x), y[:5]) + loss).backward()
    assert loss == 0
    assert not loss.requires_grad
    assert tasks.terms() == {}
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in tasks.parameters())


def test_only_the_ends_are_regularised() -> None:
    model, (x, y) = mlp(), batch()
    both(model).loss(x, y).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["4.weight", "4.bias"]


def test_scales_multiply_the_weights_and_a_scale_of_zero_costs_nothing() -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model, input=2.0, output=3.0)
    tasks.loss(x, y)
    terms = tasks.terms()
    tasks.scale, tasks.input_scale, tasks.output_scale = 0.5, 0.25, 4.0
    torch.testing.assert_close(
        tasks.loss(x, y), 0.25 * terms["input"] + 6 * terms["output"], check_dtype=False
    )
    tasks.scale_weights(0, ["input"])
    assert (tasks.input_scale, tasks.output_scale) == (0, 4)
    model[0].register_parameter("weight", None)  # what is not computed cannot fail
    tasks.loss(x, y)
    assert list(tasks.terms()) == ["output"]


# --- corruption and the end of the mirror of E ----------------------------------------------------


def test_inputs_are_corrupted_in_training_mode_of_both_only() -> None:
    model, (x, _) = mlp(), batch()
    tasks = both(model, corruption=0.5)
    torch.manual_seed(1)
    keep = torch.rand(X) >= 0.5
    model_of = tasks.reconstruct_input
    tasks.reconstruction = "sigmoid"
    expected = F.mse_loss(model_of(x * keep), x)
    clean = F.mse_loss(model_of(x), x)
    torch.manual_seed(1)
    torch.testing.assert_close(tasks.loss(x=x), expected)
    model.eval()
    torch.testing.assert_close(tasks.loss(x=x), clean)
    model.train()
    tasks.eval()
    torch.testing.assert_close(tasks.loss(x=x), clean)
    assert not torch.allclose(expected, clean)


def test_auto_takes_the_sigmoid_for_inputs_in_0_to_1_and_the_identity_else() -> None:
    model, (x, _) = mlp(), batch()
    for data, name in ((x, "sigmoid"), (x * 2 - 1, "identity")):
        auto, named = both(model), both(model, reconstruction=name)
        assert torch.equal(auto.loss(x=data), named.loss(x=data))
        assert auto.reconstruction == name
    tanh = both(model, reconstruction=torch.tanh)
    assert torch.equal(tanh.loss(x=x), both(model, reconstruction="tanh").loss(x=x))


def test_an_auto_sigmoid_refuses_later_inputs_that_it_cannot_reach() -> None:
    model, (x, _) = mlp(), batch()
    tasks = both(model)
    tasks.loss(x=x)
    with pytest.raises(
        ValueError, match=r"x: reconstruction='auto' chose the sigmoid .*pass reconstruction='identity'"
    ):
        tasks.loss(x=x + 1)
    both(model, reconstruction="sigmoid").loss(x=x + 1)  # asked for by name, it is what the user wants


# --- mirrors by the user --------------------------------------------------------------------------


def test_a_module_mirrors_what_has_no_mirror() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), Residual(4), nn.LayerNorm(4), nn.Linear(4, 7))
    encoder = nn.Linear(7, 4)
    tasks = StructuredOutput(model, last=model[2:], mirror=encoder)
    y = torch.randn(8, 7)
    torch.testing.assert_close(tasks.loss(y=y), F.mse_loss(model[2:](encoder(y)), y))
    assert set(tasks.parameters()) == set(encoder.parameters())
    wrong = StructuredOutput(model, last=model[2:], mirror=nn.Linear(7, 5))
    with pytest.raises((ValueError, RuntimeError)):
        wrong.loss(y=y)


def test_the_activation_in_front_of_last_is_the_modules_business_but_not_one_behind_a_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 7))
    encoder, y = nn.Linear(7, 4), torch.randn(8, 7)
    tasks = StructuredOutput(model, last=model[1:], mirror=encoder)
    torch.testing.assert_close(tasks.loss(y=y), F.mse_loss(model[2:](encoder(y)), y))


def test_a_module_for_each_end_is_given_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7))
    decoder = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid())
    tasks = StructuredOutput(
        model, first=model[:2], last=model[3:], input=1.0, mirror={"input": decoder}, corruption=0.0
    )
    x = torch.rand(5, 6)
    torch.testing.assert_close(tasks.loss(x=x), F.mse_loss(decoder(model[:2](x)), x))
    assert [tuple(p.shape) for n, p in tasks.named_parameters() if "output" in n] == [(4,)]


def test_free_mirrors_have_weights_of_their_own() -> None:
    tasks = both(mlp(), mirror="free")
    shapes = [tuple(p.shape) for name, p in tasks.named_parameters() if "weights" in name]
    assert shapes == [(5, 6), (4, 5), (7, 3)]


# --- describe ------------------------------------------------------------------------------------


def test_describe_prints_chains_shapes_and_shared_parameters_and_leaves_no_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model)
    model[2].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    description = tasks.describe(x, 2 * y)
    text = capsys.readouterr().out
    assert text.strip() == str(description)
    for part in (
        "0 (Linear)  5x5",
        "the code  8x3",
        "6 (Linear)  8x7",
        "6.weight 7x3",
        "mirrors.input.biases.1 5",
    ):
        assert part in text
    assert "7 (Tanh) gives values in [-1, 1] only" in text
    assert description.tasks[1].shared == ("6.weight 7x3", "6.bias 7")
    assert [m.training for m in model.modules()] == modes
    assert tasks.training
    assert tasks.reconstruction == "auto"
    assert torch.equal(torch.get_rng_state(), state)
    tasks.output_scale = 0
    assert "note: its weight is 0, so it is not computed; pass output=" in str(tasks.describe())
    assert "note: last does not begin with an activation" in str(
        StructuredOutput(model, last=model[6:]).describe()
    )


def test_convolutional_chains_are_described_with_their_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    model = convolutional()
    tasks = StructuredOutput(model, first=model[:6], last=model[7:], input=1.0)
    x, y = torch.rand(2, 2, 9, 9, dtype=torch.float64), torch.rand(2, 2, 8, 8, dtype=torch.float64)
    text = str(tasks.describe(x, y))
    for part in (
        "0 (Conv2d)  2x4x5x5",
        "5 (Flatten)  2x27",
        "its end  2x2x9x9",
        "the code  2x12",
        "8 (Unflatten)  2x3x2x2",
    ):
        assert part in text
    capsys.readouterr()
