"""Independent streams are paths of their own: no term compares encoder and decoder, or two towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_models import (
    Calls,
    Layer,
    Residual,
    ResidualNet,
    Tower,
    assert_gradients_close,
    gradients,
    images,
    make_flow,
    one_pass,
    outputs,
)
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss, flow_terms


def stack(depth: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Layer(width) for _ in range(depth)))


class Block(nn.Module):
    """Mixes twice, as residual blocks and transformer layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Held(nn.Module):
    """A tower with its blocks in a list."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self.layers, x)[-1]


class UNet(nn.Module):
    """Down and up in one module, with skip connections."""

    def __init__(self, numbered: bool) -> None:
        super().__init__()
        self.numbered = numbered
        for way in ("down", "up"):
            blocks = [Layer(4) for _ in range(3)]
            if numbered:
                for number, block in enumerate(blocks):
                    self.add_module(f"{way}{number}", block)
            else:
                self.add_module(way, nn.ModuleList(blocks))

    def way(self, name: str) -> list[nn.Module]:
        return [getattr(self, f"{name}{n}") for n in range(3)] if self.numbered else list(getattr(self, name))

    def forward(self, x: Tensor) -> Tensor:
        skips = outputs(self.way("down"), x)
        x = skips[-1]
        for block, skip in zip(self.way("up"), reversed(skips), strict=True):
            x = block(x + skip)
        return x


class Two(nn.Module):
    """Two towers, wherever they are kept."""

    def __init__(self, **towers: Any) -> None:
        super().__init__()
        for name, tower in towers.items():
            self.add_module(name, tower)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (
            list(self.children())
            if len(list(self.children())) == 2
            else list(next(self.children()).children())
        )
        return a(x) + b(x.flip(0))


STREAMS = {
    "two sequences": (lambda: Two(left=stack(), right=stack()), [["left.0", "left.1", "left.2"], ["right.0"]]),
    "two modules": (lambda: Two(a=Held(), b=Held(2)), [["a.layers.0"], ["b.layers.0", "b.layers.1"]]),
    "a dict": (lambda: Two(towers=nn.ModuleDict({"x": stack(), "y": stack()})), [["towers.x.0"], ["towers.y.0"]]),
    "a list": (lambda: Two(towers=nn.ModuleList([stack(), stack()])), [["towers.0.0"], ["towers.1.0"]]),
    "down and up": (lambda: UNet(False), [["down.0"], ["up.0", "up.1", "up.2"]]),
    "numbered down and up": (lambda: UNet(True), [["down0", "down1", "down2"], ["up0"]]),
    "encoder and decoder": (
        lambda: nn.Transformer(4, 2, 3, 3, 8, batch_first=True, dropout=0.0),
        [["encoder.layers.0"], ["decoder.layers.0"]],
    ),
    "activations": (
        lambda: Two(
            a=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
            b=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
        ),
        [["a.1", "a.3", "a.5"], ["b.1", "b.3"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "starts"), STREAMS.values(), ids=STREAMS)
def test_auto_keeps_independent_streams_apart(make: Any, starts: list[list[str]]) -> None:
    model = make()
    flow = FeatureFlow(model)
    assert [path[: len(start)] for path, start in zip(flow.paths, starts, strict=True)] == starts
    features: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in flow.layers:
            module.register_forward_hook(lambda _m, _a, out, name=name: features.__setitem__(name, out))
    x = torch.randn(3, 5, 4)
    with flow:
        out = model(x, x) if isinstance(model, nn.Transformer) else model(x)
        loss = flow.loss()
        terms = flow.terms()
    assert len(terms.gradient) == sum(len(path) - 1 for path in flow.paths)
    truth = sum(ffr_loss([features[n] for n in path], backend="reference") for path in flow.paths)
    torch.testing.assert_close(loss, truth)
    task = out.square().mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    actual = torch.autograd.grad(task + loss, parameters, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(task + truth, parameters, allow_unused=True)
    assert_gradients_close(list(actual), list(expected))


@pytest.mark.parametrize("length", [5, 7])
def test_the_number_of_terms_does_not_depend_on_the_length_of_a_sequence(length: int) -> None:
    model = nn.Transformer(8, 2, 3, 3, 16, batch_first=True)
    with make_flow(model) as flow:
        model(torch.randn(2, 5, 8), torch.randn(2, length, 8))
        flow.loss()
        assert (len(flow.terms().gradient), len(flow.terms().curvature)) == (4, 2)


def test_a_path_by_hand_is_what_it_says() -> None:
    model = Two(left=stack(), right=stack())
    by_hand = [["left.0", model.left[2]], ["right.0", "right.1"]]
    with make_flow(model, by_hand) as flow:
        assert flow.paths == [["left.0", "left.2"], ["right.0", "right.1"]]
        assert flow.layers == ["left.0", "left.2", "right.0", "right.1"]
        model(torch.randn(3, 4))
        flow.loss()
        assert len(flow.terms().gradient) == 2
    with make_flow(model, ["left.0", "left.1", "right.0", "right.1"]) as flow:  # one list is one path
        model(torch.randn(3, 4))
        flow.loss()
        assert len(flow.terms().gradient) == 3


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([["left.0"], "right.0"], TypeError, r"layers\[1\]: expected a list of names and modules.* got str"),
        ([["left.0"], ["left.0"]], ValueError, r"layers\[1\]: 'left\.0' is listed twice"),
        ([["left.0"], []], ValueError, r"layers\[1\]: layers: expected at least one"),
        ([["left.0"], ["left.9"]], ValueError, r"layers\[1\]: layers\[0\]: the model has no module named"),
    ],
)
def test_a_wrong_path_by_hand_is_named(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureFlow(Two(left=stack(), right=stack()), layers)


def test_one_weight_a_term_goes_through_the_paths() -> None:
    model, x = Two(left=stack(), right=stack()), torch.randn(3, 4)
    left, right = outputs(model.left, x), outputs(model.right, x.flip(0))
    weights = [1.0, 2.0, 3.0, 4.0]
    truth = ffr_loss(left, gradient=weights[:2], curvature=0.5, backend="reference")
    truth = truth + ffr_loss(right, gradient=weights[2:], curvature=0.5, backend="reference")
    with make_flow(model, gradient=weights, curvature=0.5) as flow:
        model(x)
        torch.testing.assert_close(flow.loss(), truth)
        with one_pass(flow):
            model(x)
            model(x)
        torch.testing.assert_close(flow.loss(), 2 * truth)
    with make_flow(model, gradient=weights[:3]) as flow:
        model(x)
        with pytest.raises(ValueError, match="gradient"):
            flow.loss()


def test_stages_stay_one_path_where_terms_between_them_are_wanted() -> None:
    model = ResidualNet(2)
    assert FeatureFlow(model).paths == [["early.0", "early.1"], ["late.0", "late.1"]]
    flow = FeatureFlow(model, transition="pool")
    assert flow.paths == [["early.0", "early.1", "late.0", "late.1"]]
    assert len(flow.describe(images()).gradient) == 3
    towers = FeatureFlow(Two(a=Held(), b=Held()), transition="pool")
    assert len(towers.paths) == 2


def test_what_is_alone_in_its_parent_goes_with_its_neighbours() -> None:
    model = nn.Sequential(nn.Sequential(Residual(4), nn.ReLU()), Residual(4), Residual(4))
    assert FeatureFlow(model).paths == [["0.0", "1", "2"]]


def test_a_module_with_two_parents_is_in_one_path() -> None:
    shared = Block()
    model = nn.ModuleDict({"a": nn.Sequential(Block(), shared), "b": nn.Sequential(shared, Block(), Block())})
    assert FeatureFlow(model).paths == [["a.0", "a.1"], ["b.1", "b.2"]]


def test_describe_lists_the_terms_of_each_path() -> None:
    description = FeatureFlow(Two(left=stack(), right=stack())).describe(torch.randn(3, 4))
    assert description.gradient == [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert description.stages == [[0, 1, 2], [3, 4, 5]]


# --- in a pass by hand ----------------------------------------------------------------------------


def test_calls_of_one_stream_are_calls() -> None:
    """A step that calls encoder and decoder one by one, the encoder on two inputs."""
    model, (x, y) = Two(encoder=Held(), decoder=Held()), torch.randn(2, 3, 4)
    truth = sum(ffr_loss(outputs(model.encoder.layers, each), backend="reference") for each in (x, y))
    truth = truth + ffr_loss(outputs(model.decoder.layers, x), backend="reference")
    with make_flow(model) as flow:
        with one_pass(flow):
            model.encoder(x)
            model.decoder(x)
            model.encoder(y)
        torch.testing.assert_close(flow.loss(), truth)


# --- one module on two inputs ---------------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.tower, self.recurrent = Tower(), recurrent

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = self.tower.layers(x)
        second = self.tower.layers(0.5 * first if self.recurrent else y)
        return first + second


def test_a_siamese_network_has_a_path_for_each_input(backend: str) -> None:
    model, (x, y) = Siamese(), torch.randn(2, 3, 8)
    truth = sum(ffr_loss(outputs(model.tower.layers, each), backend=backend) for each in (x, y))
    true_gradients = gradients(model, truth)
    with FeatureFlow(model, backend=backend) as flow:
        model(x, y)
        loss = flow.loss()
        torch.testing.assert_close(loss, truth)
        assert_gradients_close(gradients(model, loss), true_gradients)
        with one_pass(flow):
            model(x, y)
        torch.testing.assert_close(flow.loss(), truth)


def test_a_recurrent_network_has_one_path() -> None:
    model, (x, y) = Siamese(recurrent=True), torch.randn(2, 3, 8)
    first = outputs(model.tower.layers, x)
    truth = flow_terms(first + outputs(model.tower.layers, 0.5 * first[-1]), backend="reference")
    with make_flow(model) as flow:
        model(x, y)
        flow.loss()
        torch.testing.assert_close(flow.terms().gradient, truth.gradient.detach())
    cell = Calls(lambda self, x: self.cell(self.cell(self.cell(x))), cell=nn.Linear(4, 4))
    with make_flow(cell, "cell") as flow:
        cell(torch.randn(3, 4))
        flow.loss()
        assert len(flow.terms().gradient) == 2
