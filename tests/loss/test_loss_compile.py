"""torch.compile: one graph, the same numbers, no recompilation per size."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import random_features
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ffr_ext import compiled as traced
from ffr_ext import ffr_loss, flow_terms

symbolic_sizes_in_order = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="Dynamo of torch 2.10 mixes up a node's symbolic sizes"
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _net() -> torch.nn.ModuleList:
    return torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(4)]).double()


def _step(net: torch.nn.ModuleList, x: Tensor, **options: Any) -> Tensor:
    features = []
    for layer in net:
        x = layer(x).relu()
        features.append(x)
    return x.square().mean() + 3 * ffr_loss(features, gradient=0.5, **options)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "l1"},
        {"norm": "l2"},
        {"norm": "l2_squared", "reduction": "sum"},
        {"norm": "l1", "curvature_kind": "angle"},
        {"curvature": [1.0, 2.0]},
    ],
    ids=str,
)
def test_a_training_step_is_one_graph_with_the_same_gradients(
    compiler: str, options: Any, backend: str
) -> None:
    net, x = _net(), torch.randn(5, 6, dtype=torch.float64)
    options = {**options, "backend": backend}
    loss = _step(net, x, **options)
    expected = torch.autograd.grad(loss, list(net.parameters()))
    compiled = torch.compile(_step, fullgraph=True, backend=compiler)
    loss_compiled = compiled(net, x, **options)
    grads = torch.autograd.grad(loss_compiled, list(net.parameters()))
    assert torch.allclose(loss, loss_compiled)
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("mode", ["no_grad", "no gradient wanted"])
@pytest.mark.parametrize("norm", ["l1", "l2_squared"])
def test_a_loss_that_nobody_differentiates_is_one_graph(norm: str, mode: str, backend: str) -> None:
    features = random_features(*[(3, 4)] * 4)
    if mode == "no gradient wanted":
        features = [f.detach() for f in features]
    with torch.set_grad_enabled(mode != "no_grad"):
        compiled = torch.compile(ffr_loss, fullgraph=True, backend="aot_eager")(
            features, norm=norm, backend=backend
        )
    assert not compiled.requires_grad
    torch.testing.assert_close(compiled, ffr_loss(features, norm=norm, backend=backend).detach())


@pytest.mark.skipif(
    torch.__version__ < "2.11", reason="Dynamo of torch 2.10 refuses an autograd.Function there"
)
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_an_argument_of_a_compiled_torch_func_grad_can_be_a_feature_itself(norm: str, backend: str) -> None:
    """Inside such a graph Dynamo tells an autograd.Function that this argument needs no gradient."""

    def loss(x: Tensor) -> Tensor:
        return ffr_loss([2 * x, x, x * x], norm=norm, backend=backend)

    x = torch.randn(3, 4, dtype=torch.float64)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(loss)(x))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_weights_may_be_integers_in_a_graph(norm: str) -> None:
    """While something traces, a weight is what the caller gave: no float has been made of it."""

    class Loss(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return ffr_loss([a, b, c], gradient=1, curvature=2, norm=norm)

    x = [torch.randn(2, 3, 4) for _ in range(3)]
    expected = ffr_loss(x, gradient=1.0, curvature=2.0, norm=norm)
    step = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(*x), expected)
    exported = torch.export.export(Loss(), tuple(x), strict=False).module()
    torch.testing.assert_close(exported(*x), expected)


def test_an_exported_backward_pass_gets_the_functional_ops() -> None:
    """What fills its outputs would be wrapped in functions that clone every gradient."""

    class Gradients(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a = a.requires_grad_()
            (grad,) = torch.autograd.grad(ffr_loss([a, b], backend="cpu"), a)
            return grad

    program = torch.export.export(Gradients(), (torch.randn(2, 3), torch.randn(2, 3)), strict=False)
    called = {str(node.target) for node in program.graph.nodes}
    assert not any("flow_backward" in name for name in called), called
    assert any("flow_gradients" in name for name in called), called


def test_compiled_terms(backend: str) -> None:
    features = random_features(*[(3, 4)] * 4)
    compiled = torch.compile(flow_terms, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(features, backend=backend), flow_terms(features, backend=backend), strict=True):
        assert torch.allclose(a, b)


def test_no_graph_break_with_pooled_transitions_and_partial_gradients(backend: str) -> None:
    features = random_features(*[(3, 4, 4, 4)] * 3, *[(3, 8, 2, 2)] * 2)
    features[1].requires_grad_(False)

    def loss(f: list[Tensor]) -> Tensor:
        return ffr_loss(f, transition="pool", backend=backend)

    assert torch._dynamo.explain(loss)(features).graph_break_count == 0
    wanted = [f for f in features if f.requires_grad]
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(features), wanted)
    for a, b in zip(compiled, torch.autograd.grad(loss(features), wanted), strict=True):
        assert torch.allclose(a, b)


@symbolic_sizes_in_order
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_sizes_are_dynamic(norm: str, backend: str) -> None:
    """16 batch sizes at 3 resolutions: a graph per size would hit torch's recompile limit and silently run eagerly."""
    counter = CompileCounter()

    def loss(f: list[Tensor]) -> Tensor:
        return ffr_loss(f, norm=norm, backend=backend)

    compiled = torch.compile(loss, backend=counter, dynamic=True, fullgraph=True)
    for batch in range(2, 18):
        for size in (4, 6, 10):
            features = random_features(*[(batch, 3, size, size)] * 3)
            assert torch.allclose(compiled(features), loss(features), rtol=1e-5)
    assert counter.frame_count <= 2


@symbolic_sizes_in_order
def test_sizes_of_features_in_channels_last_are_dynamic(backend: str) -> None:
    """Their storage order is found without sorting strides, which are symbolic."""

    def loss(f: list[Tensor]) -> Tensor:
        return ffr_loss(f, backend=backend)

    compiled = torch.compile(loss, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch, size in ((2, 4), (3, 6)):
        features = [
            x.detach().to(memory_format=torch.channels_last).requires_grad_()
            for x in random_features(*[(batch, 3, size, size)] * 3)
        ]
        grads = torch.autograd.grad(compiled(features), features)
        for a, b in zip(grads, torch.autograd.grad(loss(features), features), strict=True):
            assert torch.allclose(a, b)
            assert a.stride() == b.stride()


@symbolic_sizes_in_order
def test_dynamic_sizes_under_inductor_have_right_gradients(backend: str) -> None:
    def loss(f: list[Tensor]) -> Tensor:
        return ffr_loss([x * 2 for x in f], backend=backend)

    compiled = torch.compile(loss, dynamic=True, fullgraph=True)
    for batch in (2, 3, 5):
        features = random_features(*[(batch, 3, 7)] * 3)
        for a, b in zip(
            torch.autograd.grad(compiled(features), features),
            torch.autograd.grad(loss(features), features),
            strict=True,
        ):
            assert torch.allclose(a, b)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_no_generator_reads_a_layout(norm: str, backend: str) -> None:
    """Dynamo begins a backward pass again where it reads a layout. From torch 2.14 on, a generator that was left in the
    middle then raises "generator already executing"."""
    read: list[str] = []

    def watch(frame: FrameType | None, event: str, function: Any) -> None:
        if event != "c_call" or function.__name__ not in ("stride", "is_contiguous"):
            return
        while frame is not None and "ffr_ext" in frame.f_globals["__name__"]:
            if frame.f_code.co_flags & inspect.CO_GENERATOR:
                read.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            frame = frame.f_back

    features = [f.transpose(1, 2) for f in random_features(*[(2, 3, 4, 5)] * 3)]
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        # Weights in a tensor take the way that is also compiled.
        ffr_loss(features, gradient=torch.tensor([0.5, 2.0]), norm=norm, backend=backend).backward()
    finally:
        sys.setprofile(before)
    assert read == []


def test_mixed_up_sizes_are_no_wrong_sum(fused: str) -> None:
    features = random_features(*[(4, 3, 5)] * 3)
    for groups in (1, 4, 12, 60):
        torch.ops.ffr_ext.flow_stats(features, [3], [groups], True, False, fused)
    with pytest.raises(
        RuntimeError, match=r"leading dimensions of .4, 3, 5., got 5: torch .* symbolic sizes"
    ):
        torch.ops.ffr_ext.flow_stats(features, [3], [5], True, False, fused)


@pytest.mark.parametrize("mixes", [False, True])
def test_auto_takes_the_kernels_of_a_gpu_only_where_their_sizes_stay_in_order(
    mixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(traced, "_MIXES_SIZES", mixes)
    monkeypatch.setattr(traced.backends, "resolve", lambda backend, device: "cuda")
    expected = traced.DECOMPOSED if mixes else "cuda"
    assert traced.resolve("auto", torch.device("cuda")) == expected
    assert traced.resolve("cuda", torch.device("cuda")) == "cuda"
    assert traced.resolve("auto", torch.device("cpu")) == traced.DECOMPOSED
