"""FeatureFlow under torch.compile: right numbers or an explicit error, never a silent zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flow_models import (
    Calls,
    ResidualNet,
    Tower,
    assert_gradients_close,
    expected,
    gradients,
    images,
    penalty,
    task_loss,
)
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.parallel import DistributedDataParallel

from ffr_ext import FeatureFlow, _torch, ffr_loss


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_attach_then_compile_gives_the_eager_numbers(compiler: str, fullgraph: bool) -> None:
    model, x = ResidualNet(2), images()
    truth, truth_gradients = expected(model, x, backend="reference")
    with FeatureFlow(model, backend="reference") as flow:
        compiled = torch.compile(model, backend=compiler, fullgraph=fullgraph)
        for _ in range(2):
            task = task_loss(compiled(x))
            penalty = flow.loss()
            torch.testing.assert_close(penalty.detach(), truth)
            assert_gradients_close(gradients(model, task + penalty), truth_gradients, 1e-5)


def test_compile_then_attach_is_an_error() -> None:
    model, x = ResidualNet(2), images()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with FeatureFlow(model, backend="reference") as flow:
        compiled(x)
        with pytest.raises(RuntimeError, match=r"torch\.compile"):
            flow.loss()


def test_a_twin_compiled_without_hooks_first_is_an_error() -> None:
    torch.compile(ResidualNet(2), backend="eager")(images())
    model = ResidualNet(2)
    with FeatureFlow(model, backend="reference") as flow:
        torch.compile(model, backend="eager")(images())
        with pytest.raises(RuntimeError, match=r"torch\.compile"):
            flow.loss()


def test_compiled_in_place_attach_first_works() -> None:
    model, x = ResidualNet(2), images()
    truth = expected(model, x, backend="reference")[0]
    with FeatureFlow(model, backend="reference") as flow:
        model.compile(backend="eager")
        model(x)
        torch.testing.assert_close(flow.loss().detach(), truth)


def test_separately_compiled_blocks_attach_first_work() -> None:
    model, x = ResidualNet(2), images()
    truth = expected(model, x, backend="reference")[0]
    with FeatureFlow(model, backend="reference") as flow:
        for block in [*model.early, *model.late]:
            block.compile(backend="eager")
        model(x)
        torch.testing.assert_close(flow.loss().detach(), truth)


@pytest.mark.parametrize(("where", "fullgraph"), [("model", True), ("model", False), ("stack", False)])
def test_calls_in_a_pass_by_hand(where: str, fullgraph: bool) -> None:
    """Each is a path, and neither more calls nor more passes are traced anew, before or after ordinary ones."""
    model, inputs = Tower(), [torch.randn(5, 8) for _ in range(10)]
    truths = [penalty(model, x).detach() for x in inputs]
    graphs = []
    with FeatureFlow(model) as flow:
        (model if where == "model" else model.layers).compile(backend="aot_eager", fullgraph=fullgraph)
        for count in (2, 1, 3, 10):
            model(inputs[0])
            torch.testing.assert_close(flow.loss().detach(), truths[0])
            flow.begin_pass()
            for x in inputs[:count]:
                model(x)
                with torch.no_grad():
                    model(x)
            flow.end_pass()
            torch.testing.assert_close(flow.loss().detach(), torch.stack(truths[:count]).sum())
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # From torch 2.14 on, an ordinary call of a module that is compiled by itself is traced once more after the first
    # pass by hand, which puts hooks on it.
    once_more = int(where == "stack" and torch.__version__ >= "2.14")
    assert graphs == [graphs[0], *[graphs[0] + once_more] * 3]


@pytest.mark.parametrize("fullgraph", [True, False])
def test_streams_stay_apart(fullgraph: bool) -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True, dropout=0.0)
    inputs = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with FeatureFlow(model) as flow:
        truth = gradients(model, model(*inputs).square().mean() + flow.loss())
        terms = flow.terms()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        for _ in range(2):
            loss = compiled(*inputs).square().mean() + flow.loss()
            torch.testing.assert_close(flow.terms().gradient, terms.gradient)
            assert_gradients_close(gradients(model, loss), truth, 1e-5)


def test_a_loss_gets_the_penalty_of_the_compiled_calls_it_depends_on() -> None:
    model, (x, y) = Tower(), torch.randn(2, 5, 8)
    truth = penalty(model, x).detach()
    with FeatureFlow(model) as flow:
        compiled = torch.compile(model, backend="aot_eager")
        flow.begin_pass()
        output, _ = compiled(x), compiled(y)
        loss = flow.loss_for(output.square().mean())
        assert loss is not None
        torch.testing.assert_close(loss.detach(), truth)
        flow.after_backward()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_feature_overwritten_inside_the_compiled_graph_is_an_error(compiler: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x)))).sum()

    model = Calls(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), act=nn.ReLU(inplace=True))
    with FeatureFlow(model, ["a", "b"], backend="reference") as flow:
        torch.compile(model, backend=compiler)(torch.randn(3, 4))
        with pytest.raises(RuntimeError, match="'a' was overwritten"):
            flow.loss()


def _eager(model: nn.Sequential, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    with FeatureFlow(model, list(model)) as flow:
        task, penalty = task_loss(model(x)), flow.loss()
        return penalty.detach(), gradients(model, task + penalty)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("inside", [False, True], ids=["compile(DDP)", "DDP(compile)"])
def test_distributed_data_parallel_may_cut_the_graph_at_its_buckets(
    inside: bool, inplace: bool, one_process_group: None
) -> None:
    blocks = [nn.Sequential(nn.Linear(512, 512), nn.ReLU(inplace)) for _ in range(5)]
    model, x = nn.Sequential(*blocks), torch.randn(2, 512)  # 1 MB a layer, as much as a first bucket takes
    truth, truth_gradients = _eager(model, x)
    with FeatureFlow(model, blocks) as flow:
        if inside:
            wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
        else:
            wrapped = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        output = wrapped(x)
        penalty = flow.loss()
        torch.testing.assert_close(penalty.detach(), truth)
        assert_gradients_close(gradients(model, task_loss(output) + penalty), truth_gradients, 1e-5)


def test_where_processes_train_together_a_feature_keeps_the_value_it_had(one_process_group: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    first = model[0](x)
    second = model[2](first.relu())
    with FeatureFlow(model, ["0", "2"]) as flow:
        torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(flow.loss(), ffr_loss([first, second]))


def test_a_hook_may_break_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
    x = torch.randn(3, 4)
    truth, truth_gradients = _eager(model, x)
    ask = _torch.graph_in_work

    def breaks() -> str:
        torch._dynamo.graph_break()
        return ask()

    monkeypatch.setattr(_torch, "graph_in_work", breaks)
    with FeatureFlow(model, list(model)) as flow:
        output = torch.compile(model, backend="aot_eager")(x)
        penalty = flow.loss()
        torch.testing.assert_close(penalty.detach(), truth)
        assert_gradients_close(gradients(model, task_loss(output) + penalty), truth_gradients, 1e-5)


def test_a_graph_break_may_lie_between_features_made_in_place() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.c(self.b(x))

    layers = {name: nn.Sequential(nn.Linear(4, 4), nn.ReLU(True)) for name in "abc"}
    model, x = Calls(forward, **layers), torch.randn(3, 4)
    with FeatureFlow(model, list(layers)) as flow:
        model(x)
        truth = flow.loss()
        torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(flow.loss(), truth)


@pytest.mark.parametrize("inplace", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize(
    "compiled", [(0,), (0, 1), (0, 2, 4), (0, 1, 2), (3,), (4,), tuple(range(5))], ids=str
)
def test_some_layers_may_be_compiled_and_others_not(compiled: tuple[int, ...], inplace: bool) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace)) for _ in range(5)])
    x = torch.randn(3, 4)
    truth, truth_gradients = _eager(model, x)
    with FeatureFlow(model, list(model)) as flow:
        for index in compiled:
            model[index].compile(backend="aot_eager")
        output = model(x)
        penalty = flow.loss()
        torch.testing.assert_close(penalty.detach(), truth)
        assert_gradients_close(gradients(model, task_loss(output) + penalty), truth_gradients, 1e-5)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_the_layer_that_overwrites_can_be_captured_from_a_compiled_graph(compiler: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    first = model[1](model[0](x))
    second = model[3](model[2](first))
    truth = ffr_loss([first, second], backend="reference")
    with FeatureFlow(model, backend="reference") as flow:
        torch.compile(model, backend=compiler)(x)
        torch.testing.assert_close(flow.loss().detach(), truth.detach())


@pytest.mark.slow
def test_compiled_autograd(fused: str) -> None:
    """The forward is eager and has taps; the backward pass is compiled and adds in its own way."""
    model, x = Tower(3, width=4), torch.randn(5, 4)
    features = []
    for layer in model.layers:
        features.append(layer(features[-1] if features else x))
    truth = gradients(model, task_loss(model.head(features[-1])) + ffr_loss(features, backend=fused))
    with FeatureFlow(model, model.layers, backend=fused) as flow:
        loss = task_loss(model(x)) + flow.loss()
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            assert_gradients_close(gradients(model, loss), truth, 1e-6)


def test_the_hook_free_route_compiles_into_one_graph(backend: str) -> None:
    """What the documentation recommends: return the features, and call ffr_loss inside the compiled step."""
    model, x = ResidualNet(2), images()
    truth, truth_gradients = expected(model, x, backend=backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = model.features(x)
        penalty = ffr_loss(features, backend=backend)
        return task_loss(logits) + penalty, penalty

    loss, penalty = step(x)
    torch.testing.assert_close(penalty.detach(), truth)
    assert_gradients_close(gradients(model, loss), truth_gradients, 1e-5)
