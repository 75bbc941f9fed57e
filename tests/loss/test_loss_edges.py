"""Empty features, who gets a gradient, upstream gradients of every kind, and the autograd contract."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import loss_and_grads, random_features
from torch import Tensor

from ffr_ext import ffr_loss, flow_terms, reference

NORMS = ["l1", "l2_squared", "l2"]
EMPTY = [(0, 3), (3, 0), (2, 3, 0, 4), (0,)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_empty_features_cost_nothing(
    shape: tuple[int, ...], norm: str, kind: str, reduction: str, backend: str
) -> None:
    """The sum over nothing is 0, and so is its mean; gradients have the right shape."""
    features = random_features(*[shape] * 4)
    result = loss_and_grads(features, norm=norm, curvature_kind=kind, reduction=reduction, backend=backend)
    assert result.loss.item() == 0.0
    assert [g.shape for g in result.grads] == [f.shape for f in features]


def test_an_empty_stage_between_others(fused: str) -> None:
    features = random_features((2, 3), (2, 3), (2, 0), (2, 0), (2, 5), (2, 5))
    ours, eager = (loss_and_grads(features, backend=b) for b in (fused, "reference"))
    assert ours.loss.item() == pytest.approx(eager.loss.item())
    for a, b in zip(ours.grads, eager.grads, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("wanted", [{0}, {2}, {4}, {1, 3}, {0, 1, 2, 3, 4}], ids=str)
def test_only_features_that_require_grad_get_one(norm: str, wanted: set[int], fused: str) -> None:
    features = random_features(*[(3, 7)] * 5)
    full = loss_and_grads(features, norm=norm, backend="reference").grads
    for i, feature in enumerate(features):
        feature.requires_grad_(i in wanted)
    grads = loss_and_grads(features, norm=norm, backend=fused).grads
    for i, grad in enumerate(grads):
        assert (grad is not None) == (i in wanted)
        if grad is not None:
            assert torch.allclose(grad, full[i], atol=1e-6)


def test_nothing_is_saved_without_a_gradient(fused: str) -> None:
    features = random_features(*[(3, 7)] * 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not ffr_loss(features, backend=fused).requires_grad
        assert not ffr_loss([f.detach() for f in features], backend=fused).requires_grad
    assert saved == []


@pytest.mark.parametrize("container", [list, tuple, iter, lambda f: dict(enumerate(f)).values()])
def test_any_iterable_of_features(container: Any, backend: str) -> None:
    features = random_features(*[(3, 7)] * 3)
    expected = ffr_loss(features, backend=backend)
    loss = ffr_loss(container(features), backend=backend)
    assert loss.requires_grad
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["difference", "angle"])
def test_terms_take_any_upstream_gradient(norm: str, kind: str, fused: str) -> None:
    """Random upstream with zeros and negatives, and the stride-0 upstream that .sum() and .mean() send."""
    features = random_features(*[(3, 7)] * 4, *[(3, 2)] * 3, dtype=torch.float64)
    on_gradient = torch.tensor([0.0, -1.0, 2.5, 0.3, -0.7], dtype=torch.float64)
    on_curvature = torch.tensor([1.5, 0.0, -2.0], dtype=torch.float64)
    for scalar in (
        lambda t: (on_gradient * t.gradient).sum() + (on_curvature * t.curvature).sum(),
        lambda t: t.gradient.sum() - t.curvature.mean(),
        lambda t: t.curvature[1] * 3,
        lambda t: torch.linalg.vector_norm(t.gradient),
    ):
        grads = [
            torch.autograd.grad(
                scalar(flow_terms(features, norm=norm, curvature_kind=kind, backend=b)),
                features,
                allow_unused=True,
            )
            for b in (fused, "reference")
        ]
        for ours, eager in zip(*grads, strict=True):
            ours = torch.zeros(()) if ours is None else ours
            eager = torch.zeros(()) if eager is None else eager
            assert torch.allclose(ours, eager.to(ours.dtype), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("transition", ["break", "pool"])
def test_gradcheck(norm: str, kind: str, transition: str, fused: str) -> None:
    features = random_features(*[(2, 3, 4)] * 3, *[(2, 3, 2)] * 2, dtype=torch.float64)

    def loss(*f: Tensor) -> Tensor:
        return ffr_loss(f, norm=norm, curvature_kind=kind, transition=transition, backend=fused)

    assert torch.autograd.gradcheck(loss, features)


@pytest.mark.parametrize("norm", NORMS)
def test_double_backward_raises(norm: str, fused: str) -> None:
    """A second derivative that is silently missing would be a wrong gradient."""
    features = random_features(*[(2, 5)] * 3)
    loss = ffr_loss(features, norm=norm, backend=fused)
    with pytest.raises(RuntimeError, match=r"second derivative.*backend='reference'"):
        torch.autograd.grad(loss, features, create_graph=True)


@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_can_be_differentiated_twice(norm: str) -> None:
    features = random_features(*[(2, 5)] * 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *f: ffr_loss(f, norm=norm, backend="reference"), features)


@pytest.mark.parametrize("norm", NORMS)
def test_backward_twice_over_a_retained_graph(norm: str, fused: str) -> None:
    features = random_features(*[(2, 5)] * 3)
    loss = ffr_loss(features, norm=norm, backend=fused)
    first = torch.autograd.grad(loss, features, retain_graph=True)
    second = torch.autograd.grad(loss, features)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_inputs_are_never_written(norm: str, fused: str) -> None:
    """softmax saves its output: writing to a feature would corrupt its gradient without any error."""
    leaves = random_features(*[(2, 5)] * 3)
    features = [leaf.softmax(1) for leaf in leaves]
    before = [f.detach().clone() for f in features]
    versions = [f._version for f in features]
    ours = torch.autograd.grad(ffr_loss(features, norm=norm, backend=fused), leaves)
    assert all(torch.equal(f, b) for f, b in zip(features, before, strict=True))
    assert [f._version for f in features] == versions
    eager = torch.autograd.grad(reference.ffr_loss([leaf.softmax(1) for leaf in leaves], norm=norm), leaves)
    for a, b in zip(ours, eager, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_saved_tensors_hooks_see_everything_that_is_saved(fused: str) -> None:
    """Offloading and checkpointing work through these hooks; a tensor kept elsewhere would escape them."""
    features = random_features(*[(4, 32)] * 4)
    for norm, expected in (("l1", torch.uint8), ("l2", torch.float32)):
        saved: list[Tensor] = []

        def pack(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t)
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = ffr_loss(features, norm=norm, backend=fused)
        assert any(t.dtype == expected and t.numel() > 8 for t in saved)
        eager = loss_and_grads(features, norm=norm, backend="reference").grads
        for ours, b in zip(torch.autograd.grad(loss, features), eager, strict=True):
            assert torch.allclose(ours, b, atol=1e-6)


def test_l1_keeps_no_feature_alive(fused: str) -> None:
    leaf = torch.randn(4, 32, requires_grad=True)
    features = [leaf * k for k in (1.0, 2.0, 3.0)]
    loss = ffr_loss(features, backend=fused)
    alive = [weakref.ref(f) for f in features]
    del features
    gc.collect()
    assert not any(r() is not None for r in alive)
    loss.backward()
    assert leaf.grad is not None


def test_changing_a_feature_in_place_before_backward_is_an_error_where_its_values_are_needed(
    fused: str,
) -> None:
    leaf = torch.randn(4, 8, requires_grad=True)
    features = [leaf * 1, leaf * 2]
    loss = ffr_loss(features, norm="l2", backend=fused)
    features[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("norm", NORMS)
def test_torch_func_grad(norm: str, fused: str) -> None:
    features = tuple(random_features(*[(2, 5)] * 3, requires_grad=False))
    grads = torch.func.grad(lambda f: ffr_loss(f, norm=norm, backend=fused))(features)
    eager = torch.func.grad(lambda f: ffr_loss(f, norm=norm, backend="reference"))(features)
    for a, b in zip(grads, eager, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_torch_func_grad_of_grad_raises_where_it_would_be_wrong(fused: str) -> None:
    features = tuple(random_features(*[(2, 5)] * 3, requires_grad=False))

    def gradient_norm(f: tuple[Tensor, ...]) -> Tensor:
        return sum(
            g.square().sum() for g in torch.func.grad(lambda x: ffr_loss(x, norm="l2", backend=fused))(f)
        )

    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(gradient_norm)(features)


def test_torch_func_functional_call(fused: str) -> None:
    net = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)]).double()
    x = torch.randn(4, 6, dtype=torch.float64)

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x: Tensor) -> list[Tensor]:
            out = [x]
            for layer in self.net:
                out.append(layer(out[-1]).tanh())
            return out[1:]

    module = Features()
    params = dict(module.named_parameters())
    grads = [
        torch.func.grad(lambda p, b=b: ffr_loss(torch.func.functional_call(module, p, (x,)), backend=b))(
            params
        )
        for b in (fused, "reference")
    ]
    for name in params:
        assert torch.allclose(grads[0][name], grads[1][name])


def test_vmap_gives_one_clear_error_and_works_with_the_reference(fused: str) -> None:
    features = tuple(random_features(*[(4, 2, 5)] * 3, requires_grad=False))
    per_sample = torch.func.vmap(torch.func.grad(lambda f: ffr_loss(f, backend="reference")))(features)
    for k in range(4):
        one = torch.func.grad(lambda f: ffr_loss(f, backend="reference"))(tuple(f[k] for f in features))
        for a, b in zip(per_sample, one, strict=True):
            assert torch.allclose(a[k], b)
    with pytest.raises(RuntimeError, match=r"do not support torch.vmap.*backend='reference'"):
        torch.func.vmap(lambda f: ffr_loss(f, backend=fused))(features)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_leaves_the_sums_in_float32(norm: str, backend: str) -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = [x]
        for layer in layers:
            features.append(layer(features[-1]))
        loss = ffr_loss(features[1:], norm=norm, backend=backend)
    assert features[1].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, features[1:], retain_graph=True)
    assert {g.dtype for g in grads} == {torch.bfloat16}
    loss.backward()


def test_constants_made_in_inference_mode_can_be_used_in_training_later(fused: str) -> None:
    features = random_features(*[(3, 11)] * 3)
    with torch.inference_mode():
        ffr_loss([f.detach() for f in features], gradient=0.123, curvature=[0.4], backend=fused)
        ffr_loss([f.detach() for f in features], gradient=0.123, backend=fused)
    ffr_loss(features, gradient=0.123, curvature=[0.4], backend=fused).backward()
    ffr_loss(features, gradient=0.123, backend=fused).backward()


def test_results_do_not_depend_on_the_number_of_threads(fused: str) -> None:
    features = random_features(*[(8, 16, 32, 32)] * 4, *[(8, 32, 16, 16)] * 3)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([loss_and_grads(features, norm=norm, backend=fused) for norm in NORMS])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.loss, b.loss)
            assert all(torch.equal(x, y) for x, y in zip(a.grads, b.grads, strict=True))
