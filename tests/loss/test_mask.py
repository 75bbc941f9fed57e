"""Padded batches: what a mask leaves out neither counts nor dilutes, gets no gradient, and may be anything."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffr_ext import FeatureFlow, FFRLoss, ffr_loss, flow_terms, reference
from ffr_ext.autograd import FlowCall
from ffr_ext.flow.penalties import _just_in_time
from ffr_ext.functional import penalty

LENGTHS = (5, 2, 0, 1)  # of four samples padded to 5; one of them is padding alone
NORMS, KINDS = ("l1", "l2_squared", "l2"), ("difference", "angle")
REDUCTIONS = ("sum", "batchmean", "mean")


def padded(count: int = 4, channels: int = 3, garbage: float = 0.0) -> tuple[list[Tensor], Tensor]:
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    features = [torch.randn(*mask.shape, channels, dtype=torch.float64) for _ in range(count)]
    return [torch.where(mask[..., None], f, garbage).requires_grad_() for f in features], mask


def by_sample(
    features: Sequence[Tensor], mask: Tensor, norm: str, kind: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """The terms from samples that were cut to their lengths, with nothing of the masked code."""
    samples = [[f[b][mask[b]].flatten()[None] for f in features] for b in range(len(mask)) if mask[b].any()]

    def terms(x: Sequence[Tensor], reduction: str) -> Sequence[Tensor]:
        return reference.flow_terms(x, norm=norm, curvature_kind=kind, reduction=reduction)

    totals = [sum(each) for each in zip(*(terms(sample, "sum") for sample in samples), strict=True)]
    if reduction == "sum":
        return totals[0], totals[1]
    averages = [total / len(samples) for total in totals]
    if reduction == "batchmean":
        return averages[0], averages[1]
    if norm == "l2":
        means = [sum(each) / len(samples) for each in zip(*(terms(s, "mean") for s in samples), strict=True)]
    else:
        means = list(terms([f[mask] for f in features], "mean"))
    return means[0], averages[1] if kind == "angle" else means[1]


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("norm", "kind", "reduction"), list(itertools.product(NORMS, KINDS, REDUCTIONS)), ids=str
)
def test_the_loss_is_that_of_the_samples_without_their_padding(
    norm: str, kind: str, reduction: str, garbage: float, backend: str
) -> None:
    features, mask = padded(garbage=garbage)
    options: dict[str, Any] = {"norm": norm, "curvature_kind": kind, "reduction": reduction}
    got = flow_terms(features, mask=mask, backend=backend, **options)
    expected = by_sample(features, mask, norm, kind, reduction)
    weights = [torch.arange(1.0, 1 + len(terms), dtype=torch.float64) for terms in expected]
    for terms, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(terms, truth)
    totals = [sum((w * t).sum() for w, t in zip(weights, each, strict=True)) for each in (got, expected)]
    for grad, true_grad in zip(
        torch.autograd.grad(totals[0], features), torch.autograd.grad(totals[1], features), strict=True
    ):
        assert (grad[~mask] == 0).all()
        torch.testing.assert_close(grad, true_grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mask_of_nothing_changes_nothing(norm: str, reduction: str, backend: str) -> None:
    features, mask = padded()
    for everything in (torch.ones_like(mask), torch.ones(4, dtype=torch.bool), torch.ones(1, 5).bool()):
        options: dict[str, Any] = {"norm": norm, "reduction": reduction, "backend": backend}
        torch.testing.assert_close(
            ffr_loss(features, mask=everything, **options), ffr_loss(features, **options)
        )


def test_a_mask_of_everything_is_an_empty_batch(backend: str) -> None:
    features, mask = padded(garbage=float("nan"))
    for norm, kind, reduction in itertools.product(NORMS, KINDS, REDUCTIONS):
        loss = ffr_loss(
            features,
            norm=norm,
            curvature_kind=kind,
            reduction=reduction,
            mask=torch.zeros_like(mask),
            backend=backend,
        )
        assert loss.item() == 0
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, features))


def test_zeros_and_ones_and_the_module_form(backend: str) -> None:
    features, mask = padded()
    module = FFRLoss(gradient=2.0, curvature=[0.5, -1.0], norm="l2", backend=backend)
    expected = ffr_loss(features, gradient=2.0, curvature=[0.5, -1.0], norm="l2", mask=mask, backend=backend)
    assert torch.equal(module(features, mask=mask.long()), expected)
    assert "gradient=2.0, curvature=[0.5, -1.0], norm='l2'" in repr(module)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first in memory": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "bfloat16": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_layouts_and_dtypes(norm: str, change: Any, fused: str) -> None:
    features, mask = padded(channels=6, garbage=float("nan"))
    features = [change(f.detach()).requires_grad_() for f in features]
    losses = [ffr_loss(features, norm=norm, mask=mask, backend=name) for name in (fused, "reference")]
    grads = [torch.autograd.grad(loss, features) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    for feature, ours, truth in zip(features, *grads, strict=True):
        torch.testing.assert_close(ours, truth)
        assert ours.dtype == feature.dtype


@pytest.mark.parametrize("norm", NORMS)
def test_stages_of_other_widths_and_transitions(norm: str, backend: str) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    features = [torch.randn(2, 3, width, dtype=torch.float64) for width in (4, 4, 2, 2)]
    features = [torch.where(mask[..., None], f, torch.nan).requires_grad_() for f in features]
    for transition in ("break", "pool"):
        options: dict[str, Any] = {"norm": norm, "transition": transition}
        got = flow_terms(features, mask=mask, backend=backend, **options)
        cut = [f[mask] for f in features]
        if norm == "l2":  # one position a sample: the sum over positions is not that over samples
            got = flow_terms([f[:, :1] for f in features], mask=mask[:, :1], backend=backend, **options)
            cut = [f[:, :1][mask[:, :1]][:, None] for f in features]
        elif transition == "pool":
            cut = [c[:, None] for c in cut]
        for terms, truth in zip(got, reference.flow_terms(cut, **options), strict=True):
            torch.testing.assert_close(terms, truth)


def test_samples_of_images(backend: str) -> None:
    mask = torch.tensor([True, False, True])
    features = [
        torch.randn(3, 2, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    ]
    for norm in NORMS:
        got = ffr_loss(features, norm=norm, mask=mask, backend=backend)
        torch.testing.assert_close(got, reference.ffr_loss([f[mask] for f in features], norm=norm))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_just_in_time(norm: str, kind: str, fused: str) -> None:
    """Through the taps of FeatureFlow, each feature's gradient is masked by itself."""
    inputs, mask = padded(1, garbage=float("nan"))
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4))).double()
    with FeatureFlow(model, list(model), norm=norm, curvature_kind=kind, backend=fused) as flow:
        features = []
        for layer in model:
            layer.register_forward_hook(lambda _m, _a, output: features.append(output))
        model(inputs[0])
        (path,) = flow._checked()
        loss, _ = penalty(path.features, flow.options, 1.0, 1.0, mask=mask, maker=_just_in_time(path))
    leaves = [f.detach().requires_grad_() for f in features]
    truth = ffr_loss(leaves, norm=norm, curvature_kind=kind, mask=mask, backend=fused)
    torch.testing.assert_close(loss, truth)
    truth.backward()
    (last,) = torch.autograd.grad(loss, features[-1], retain_graph=True)
    torch.testing.assert_close(last, leaves[-1].grad)
    for index, feature in enumerate(features[:-1]):  # beside what comes from the layers above
        seen: list[Tensor] = []
        handle = path.taps[index][1].grad_fn.register_hook(
            lambda grads, _outputs, seen=seen: seen.append(grads[-1])
        )
        loss.backward(retain_graph=True)
        handle.remove()
        torch.testing.assert_close(seen[0], leaves[index].grad)
        assert feature.shape == seen[0].shape


@pytest.mark.parametrize("norm", NORMS)
def test_one_graph_under_torch_compile(norm: str, backend: str) -> None:
    features, mask = padded(garbage=float("nan"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(mask: Tensor, *features: Tensor) -> Tensor:
        return ffr_loss(features, norm=norm, mask=mask, backend=backend)

    loss = step(mask, *features)
    truth = ffr_loss(features, norm=norm, mask=mask, backend=backend)
    torch.testing.assert_close(loss, truth)
    for grad, true_grad in zip(
        torch.autograd.grad(loss, features), torch.autograd.grad(truth, features), strict=True
    ):
        torch.testing.assert_close(grad, true_grad)


@pytest.mark.parametrize("norm", NORMS)
def test_torch_func(norm: str, backend: str) -> None:
    features, mask = padded(garbage=float("nan"))
    truth = torch.autograd.grad(ffr_loss(features, norm=norm, mask=mask, backend=backend), features)
    loss = lambda f: ffr_loss(f, norm=norm, mask=mask, backend=backend)  # noqa: E731
    grads = torch.func.grad(loss)([f.detach() for f in features])
    for grad, true_grad in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, true_grad)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ([[True]], TypeError, "mask: expected a bool tensor, got list"),
        (torch.ones(2, 3), TypeError, "mask: expected a bool or integer tensor.*got dtype torch.float32"),
        (torch.ones(3, 2).bool(), ValueError, r"mask: .*features\[0\] of shape \(2, 3, 4\).*shape \(3, 2\)"),
        (torch.ones(()).bool(), ValueError, r"mask: .*shape \(\)"),
        (torch.ones(2, 3, 4, 1).bool(), ValueError, r"mask: .*shape \(2, 3, 4, 1\)"),
    ],
    ids=["a list", "floats", "other sizes", "a number", "too many dimensions"],
)
def test_messages(mask: Any, error: type[Exception], match: str) -> None:
    for function in (ffr_loss, flow_terms):
        with pytest.raises(error, match=match):
            function([X, X], mask=mask)
    short = [torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2, 4), torch.zeros(2, 4)]
    with pytest.raises(ValueError, match=r"features\[2\] of shape \(2, 4\)"):
        ffr_loss(short, mask=torch.ones(2, 5).bool())


def test_a_feature_without_a_term_may_have_any_shape(fused: str) -> None:
    mask = torch.ones(2, 3).bool()
    features = [torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 5)]
    for backend in (fused, "reference"):
        loss = ffr_loss(features, mask=mask, backend=backend)
        torch.testing.assert_close(loss, ffr_loss(features[:2], backend="reference"))


def calls() -> list[FlowCall]:
    return [item for item in gc.get_objects() if type(item) is FlowCall]


def test_a_loss_that_is_kept_keeps_no_mask_after_its_backward_pass(fused: str) -> None:
    x = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True, True, False]] * 2)
    before = calls()
    loss = ffr_loss(x, norm="l2_squared", mask=mask, backend=fused)
    loss.backward()
    (call,) = [call for call in calls() if not any(call is other for other in before)]
    assert call.padding is None
