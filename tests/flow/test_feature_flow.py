"""FeatureFlow: which numbers it gives, when it captures, when it refuses, what it leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flow_models import (
    Calls,
    Checkpointed,
    ResidualNet,
    assert_gradients_close,
    expected,
    gradients,
    images,
    make_flow,
    task_loss,
)
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss, flow_terms

OPTIONS = [
    pytest.param({}, id="defaults"),
    pytest.param({"gradient": 3.0, "curvature": 0.5, "norm": "l2"}, id="float weights, exact length"),
    pytest.param({"norm": "l2_squared", "reduction": "batchmean"}, id="squares"),
    pytest.param({"gradient": [1.0, 2.0, 0.0, 4.0]}, id="one weight a term"),
    pytest.param({"curvature": torch.tensor([0.5, 2.0])}, id="weights in a tensor"),
    pytest.param({"transition": "pool"}, id="terms across the stage boundary"),
    pytest.param({"curvature_kind": "angle"}, id="total absolute curvature"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_same_numbers_as_ffr_loss_on_the_same_features(options: dict[str, Any], backend: str) -> None:
    model, x = ResidualNet(), images()
    truth, truth_gradients = expected(model, x, backend=backend, **options)
    with FeatureFlow(model, backend=backend, **options) as flow:
        task = task_loss(model(x))
        penalty = flow.loss()
        torch.testing.assert_close(penalty.detach(), truth, rtol=1e-6, atol=0)
        assert penalty.dtype == truth.dtype
        assert penalty.dim() == 0
        assert_gradients_close(gradients(model, task + penalty), truth_gradients)


def test_terms_are_the_detached_flow_terms_before_and_after_loss(backend: str) -> None:
    model, x = ResidualNet(), images()
    truth = flow_terms(model.features(x)[1], backend=backend)
    with FeatureFlow(model, backend=backend, gradient=7.0) as flow:
        model(x)
        before = flow.terms()
        flow.loss()
        after = flow.terms()
    for terms in (before, after):
        assert not terms.gradient.requires_grad
        assert not terms.curvature.requires_grad
        torch.testing.assert_close(terms.gradient, truth.gradient.detach())
        torch.testing.assert_close(terms.curvature, truth.curvature.detach())


def test_a_module_called_twice_is_two_features_in_call_order() -> None:
    shared, last = nn.Linear(4, 4), nn.Linear(4, 4)
    model = Calls(lambda self, x: self.last(self.shared(self.shared(x))), shared=shared, last=last)
    x = torch.randn(3, 4)
    first = shared(x)
    second = shared(first)
    with make_flow(model, ["last", "shared"]) as flow:
        model(x)
        torch.testing.assert_close(flow.loss(), ffr_loss([first, second, last(second)], backend="reference"))


# --- which forward counts -------------------------------------------------------------------------


def test_the_last_forward_before_loss_counts_and_never_mixes_with_an_earlier_one() -> None:
    model = ResidualNet()
    with make_flow(model) as flow:
        model(images(5))
        model(images(2))
        penalty = flow.loss()
    torch.testing.assert_close(penalty.detach(), expected(model, images(2), backend="reference")[0])


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_between_forward_and_loss_changes_nothing(how: str) -> None:
    model = ResidualNet()
    truth = expected(model, images(), backend="reference")[0]
    with make_flow(model) as flow:
        model(images())
        model.train(how != "eval")
        guard = {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[
            how
        ]
        with guard():
            model(images(7))
        model.train()
        torch.testing.assert_close(flow.loss().detach(), truth)


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_evaluation_is_captured_when_asked(guard: Any) -> None:
    model = ResidualNet().eval()
    with make_flow(model, capture_eval=True) as flow, guard():
        model(images())
        penalty = flow.loss()
    truth = ffr_loss(model.features(images())[1], backend="reference")
    torch.testing.assert_close(penalty.detach().clone(), truth.detach())


@pytest.mark.parametrize("how", ["eval", "no_grad", "no forward", "submodule only", "detached"])
def test_nothing_captured_is_an_error_never_a_zero(how: str) -> None:
    model = ResidualNet()
    flow = make_flow(model).attach()
    if how == "eval":
        model.eval()(images())
    elif how == "no_grad":
        with torch.no_grad():
            model(images())
    elif how == "submodule only":
        model.early(model.stem(images()))
    elif how == "detached":
        model(images())
        flow.detach()
    with pytest.raises(
        RuntimeError, match="not attached" if how == "detached" else "no forward pass was recorded"
    ):
        flow.loss()


def test_loss_can_be_built_once_per_forward() -> None:
    model = ResidualNet()
    with make_flow(model) as flow:
        model(images())
        flow.loss()
        with pytest.raises(RuntimeError, match="already built"):
            flow.loss()


def test_an_exception_in_forward_is_reported_and_the_next_forward_is_clean() -> None:
    model = ResidualNet()
    truth = expected(model, images(), backend="reference")[0]
    with make_flow(model) as flow:
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5, 8, 8))  # five channels
        with pytest.raises(RuntimeError, match="did not finish"):
            flow.loss()
        model(images())
        torch.testing.assert_close(flow.loss().detach(), truth)


def test_a_model_that_calls_itself_is_refused() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self(x[:1]) + self.b(self.a(x)) if len(x) > 1 else self.b(self.a(x))

    model = Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    with make_flow(model, ["a", "b"]) as flow:
        model(torch.randn(3, 4))
        with pytest.raises(RuntimeError, match="called itself"):
            flow.loss()


# --- the rest of the training step ----------------------------------------------------------------


def test_accumulated_scaled_and_retained_gradients() -> None:
    model = ResidualNet().eval()  # batch statistics would tie the samples of a batch together
    whole = expected(model, images(4), backend="reference", gradient=2.0)[1]
    model.zero_grad()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with make_flow(model, gradient=2.0) as flow:
        for part, targets in zip(images(4).chunk(2), torch.arange(4).chunk(2), strict=True):
            task = nn.functional.cross_entropy(model(part), targets)
            loss = (task + flow.loss()) * 64 / 2  # a loss scale, and the mean over two micro-batches
            loss.backward(retain_graph=True)
            loss.backward()
    assert_gradients_close([p.grad / 128 for p in model.parameters()], whole)


def test_bf16_autocast_gives_a_float32_loss_and_float32_parameter_gradients() -> None:
    model = ResidualNet()
    with make_flow(model) as flow, torch.autocast("cpu", dtype=torch.bfloat16):
        model(images())
        penalty = flow.loss()
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(
        penalty.detach(), expected(model, images(), backend="reference")[0], rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize(
    "layers", ["auto", ["early.0.conv", "early.1.conv", "early.2.conv"]], ids=["outputs", "inside"]
)
def test_recomputation_by_checkpointing_is_ignored(layers: Any) -> None:
    model, plain = Checkpointed(), ResidualNet()
    plain.load_state_dict(model.state_dict())
    results = []
    for net in (model, plain):
        with make_flow(net, layers) as flow:
            for _ in range(3):  # features must not pile up from recomputation either
                loss = task_loss(net(images())) + flow.loss()
                results.append((loss.detach(), gradients(net, loss)))
                assert flow._recorder.features == []
    torch.testing.assert_close(results[0][0], results[3][0])
    assert_gradients_close(results[0][1], results[3][1])


def test_reentrant_checkpointing_raises_with_the_advice() -> None:
    model = Checkpointed()
    model.use_reentrant = True
    with make_flow(model) as flow:
        model(images().requires_grad_())
        with pytest.raises(RuntimeError, match=r"'early\.0'.*without autograd.*use_reentrant=False"):
            flow.loss()


def test_a_fully_frozen_trajectory_is_refused() -> None:
    model = ResidualNet()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_()
    with make_flow(model) as flow:
        model(images())
        with pytest.raises(RuntimeError, match="requires grad"):
            flow.loss()


def test_frozen_early_layers_are_fine() -> None:
    model = ResidualNet()
    model.stem.requires_grad_(False)
    model.early.requires_grad_(False)
    _, truth_gradients = expected(model, images(), backend="reference")
    with make_flow(model) as flow:
        task = task_loss(model(images()))
        assert_gradients_close(gradients(model, task + flow.loss()), truth_gradients)


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda self, x: self.act(self.b(self.act(self.a(x)))), id="in-place activation"),
        pytest.param(lambda self, x: self.a(x).add_(1) + self.b(x), id="in-place addition"),
    ],
)
def test_a_feature_overwritten_in_place_is_an_error_that_names_the_layer(forward: Any) -> None:
    model = Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), act=nn.ReLU(inplace=True))
    with make_flow(model, ["a", "b"]) as flow:
        model(torch.randn(3, 4))
        with pytest.raises(RuntimeError, match=r"layer 'a' was overwritten in place"):
            flow.loss()


def test_the_layer_that_overwrites_in_place_can_be_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    with make_flow(model) as flow:
        assert flow.layers == ["1", "3"]
        model(torch.randn(3, 4))
        flow.loss().backward()


def test_a_layer_that_was_not_called_is_an_error_that_names_it() -> None:
    model = Calls(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    with make_flow(model, ["a", "b", "c"]) as flow:
        model(torch.randn(3, 4))
        with pytest.raises(RuntimeError, match="layer 'c' not called"):
            flow.loss()


# --- parallel wrappers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(capture_eval="yes"), "capture_eval: expected True or False, got 'yes'"),
        (dict(output=1.5), "output: expected an index, a key or a function .* got 1.5"),
        (dict(output=True), "output: .* got True"),
        (dict(output=b"0"), "output: .* got b'0'"),
        (dict(output=np.float64(1)), "output: .* got np.float64"),
        (dict(gradient=b"ab"), "gradient: expected a float.* got b'ab'"),
        (dict(output=[0]), r"output: .* got \[0\]"),
    ],
)
def test_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FeatureFlow(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU()), **options)


def test_data_parallel_is_refused() -> None:
    model = ResidualNet()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        FeatureFlow(nn.DataParallel(model))
    with make_flow(model):
        replica = model._replicate_for_data_parallel()  # what DataParallel runs in its threads
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            replica(images())


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"norm": "l3"}, ValueError, "norm"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"curvature_kind": "torsion"}, ValueError, "curvature_kind"),
        ({"transition": "jump"}, ValueError, "transition"),
        ({"backend": "tpu"}, ValueError, "backend"),
        ({"gradient": "strong"}, TypeError, "gradient"),
        ({"curvature": float("nan")}, ValueError, "curvature"),
    ],
)
def test_bad_options_are_refused_before_any_training(
    options: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        FeatureFlow(ResidualNet(), **options)


def test_features_without_any_term_are_an_error_that_names_their_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU())
    with make_flow(model) as flow:
        model(torch.randn(3, 4))
        with pytest.raises(ValueError, match=r"same shape[\s\S]*captured 1 \(3, 5\), 3 \(3, 6\); layers="):
            flow.loss()
    many = nn.Sequential(*[layer for n in range(20) for layer in (nn.Linear(n + 1, n + 2), nn.ReLU())])
    with make_flow(many) as flow:
        many(torch.randn(3, 1))
        with pytest.raises(ValueError, match=r"captured 1 \(3, 2\), .*23 \(3, 13\) and 8 more; layers="):
            flow.loss()


def test_the_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model: expected"):
        FeatureFlow(lambda x: x)  # type: ignore[arg-type]
