"""Which layers FeatureFlow chooses: "auto", names, modules, predicates, and the errors; and how it describes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_models import Residual, ResidualNet, images
from torch import nn

from ffr_ext import FeatureFlow


class Stage(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(4) for _ in range(depth))


class TwoStages(nn.Module):
    """One of the stages has a single block, which is a block all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Stage(2)
        self.second = nn.Sequential(Residual(4))


class ResidualStage(nn.Module):
    """Called as in transformers and timm. Its shortcut holds no block, nor does its norm."""

    def __init__(self, depth: int, first: int = 1) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        layers = [Residual(4) for _ in range(depth)]
        self.layers = nn.Sequential(nn.Sequential(*layers[:first]), *layers[first:])


class EmptyStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)


class NumberedStage(nn.Module):
    """Blocks as children of its own, without a container, as in timm's RegNet."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        for number in range(1, depth + 1):
            self.add_module(f"b{number}", Residual(4))


class Unit(nn.Module):
    """Convolution, norm and activation: a block by itself, and a part of larger ones."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.Sequential(nn.ReLU())


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = Unit(), Unit()


class Separable(nn.Module):
    """A depthwise convolution mixes no channels: this is a part, too."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = Unit(groups=4), nn.Conv2d(4, 4, 1)


class OfRuns(nn.Module):
    """A block whose body is a run of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Separable(), Separable(), Separable())


class Level(nn.Module):
    """A stage by what it holds, not by its name."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.pool = nn.Identity()
        self.blocks = nn.Sequential(*(Bottleneck() for _ in range(depth)))


class Levels(nn.Module):
    def __init__(self, *depths: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(depth) for depth in depths)


class WithAuxiliaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.AuxLogits, self.aux2 = Unit(), Unit(), Bottleneck(), Bottleneck()


class NormAct(nn.BatchNorm2d):
    """A norm with children."""

    def __init__(self) -> None:
        super().__init__(4)
        self.act = nn.ReLU()


def plain_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Softmax(1),
    )


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param(
            ResidualNet(2),
            ["early.0", "early.1", "late.0", "late.1"],
            id="residual blocks, not the Sequential stages",
        ),
        pytest.param(
            TwoStages(),
            ["first.blocks.0", "first.blocks.1", "second.0"],
            id="all blocks of a class once it repeats",
        ),
        pytest.param(
            nn.Transformer(8, 2, 2, 2, 8),
            ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"],
            id="transformer layers, not the two attentions inside a decoder layer",
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(ResidualStage(1), ResidualStage(3))),
            ["1.0.layers.0.0", "1.1.layers.0.0", "1.1.layers.1", "1.1.layers.2"],
            id="the blocks inside of stages that repeat, also where a stage has a single one",
        ),
        pytest.param(
            nn.Sequential(EmptyStage(), EmptyStage()), ["0", "1"], id="a stage without containers is a block"
        ),
        pytest.param(
            nn.Sequential(NumberedStage(1), NumberedStage(2)),
            ["0.b1", "1.b1", "1.b2"],
            id="numbered blocks of stages",
        ),
        pytest.param(
            Levels(1, 2),
            ["levels.0.blocks.0", "levels.1.blocks.0", "levels.1.blocks.1"],
            id="the blocks inside of what repeats and holds runs of them",
        ),
        pytest.param(
            nn.Sequential(Levels(2), nn.Flatten()),
            ["0.levels.0.blocks.0", "0.levels.0.blocks.1"],
            id="one such stage",
        ),
        pytest.param(
            nn.Sequential(Unit(), Bottleneck(), Unit(), Bottleneck(), Unit()),
            ["1", "3"],
            id="not the stem, whose class the blocks are made of",
        ),
        pytest.param(nn.Sequential(Unit(), Unit()), ["0", "1"], id="the same where there is nothing larger"),
        pytest.param(
            nn.Sequential(OfRuns(), OfRuns()), ["0", "1"], id="a block with a run of parts is no stage"
        ),
        pytest.param(WithAuxiliaries(), ["first", "second"], id="auxiliary classifiers are no blocks"),
        pytest.param(
            nn.Sequential(NormAct(), nn.Conv2d(4, 4, 1), NormAct()),
            ["0.act", "2.act"],
            id="norms are no blocks",
        ),
        pytest.param(plain_cnn(), ["2", "5"], id="no blocks: activations, softmax is none"),
        pytest.param(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()),
            ["2"],
            id="leaf modules that repeat are no blocks",
        ),
    ],
)
def test_auto(model: nn.Module, names: list[str]) -> None:
    assert FeatureFlow(model).layers == names


@pytest.mark.parametrize(
    ("name", "inside", "blocks"),
    [
        ("resnet", "resnet.encoder.stages.", ["0.layers.0", "0.layers.1", "1.layers.0", "1.layers.1"]),
        ("convnext", "convnext.encoder.stages.", ["0.layers.0", "1.layers.0", "1.layers.1"]),
        ("swin", "swin.encoder.layers.", ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]),
    ],
)
def test_auto_takes_the_blocks_of_the_stages_of_transformers(
    name: str, inside: str, blocks: list[str]
) -> None:
    pytest.importorskip("transformers")
    from pruning_zoo import convnext, resnet, swin

    model = {"resnet": lambda: resnet("basic"), "convnext": convnext, "swin": swin}[name]()
    flow = FeatureFlow(model.train())
    assert flow.layers == [inside + block for block in blocks]
    with flow:
        model(torch.randn(2, 3, 32, 32))
        assert flow.loss() > 0


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        pytest.param(
            lambda m: ["late.0", "stem", "early.1"], ["stem", "early.1", "late.0"], id="names, in model order"
        ),
        pytest.param(lambda m: [m.stem, m.early[0]], ["stem", "early.0"], id="modules"),
        pytest.param(lambda m: [m.stem, "early.0"], ["stem", "early.0"], id="both"),
        pytest.param(lambda m: m.early, ["early.0", "early.1"], id="the children of a container"),
        pytest.param(
            lambda m: lambda name, module: isinstance(module, nn.BatchNorm2d) and name.startswith("late"),
            ["late.0.norm", "late.1.norm"],
            id="predicate",
        ),
        pytest.param(lambda m: "stem", ["stem"], id="one name"),
    ],
)
def test_explicit_choice(layers: Any, names: list[str]) -> None:
    model = ResidualNet(2)
    assert FeatureFlow(model, layers(model)).layers == names


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["early.7"], ValueError, r"layers\[0\].*'early.7'"),
        (["stem", "0.conv"], ValueError, r"layers\[1\].*'0.conv'"),
        ([nn.Linear(2, 2)], ValueError, r"layers\[0\]: this Linear is not a module of the model"),
        (["stem", "stem"], ValueError, r"'stem' is listed twice"),
        ([], ValueError, "at least one layer"),
        ([3], TypeError, r"layers\[0\]: expected a name or a module, got int"),
        (3, TypeError, "layers: expected"),
        (lambda name, module: False, ValueError, "predicate chose none"),
        (nn.Linear(2, 2), TypeError, "wrap a single module in a list"),
    ],
)
def test_a_wrong_choice_says_what_was_expected(layers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureFlow(ResidualNet(), layers)


def test_a_model_without_blocks_or_activations_needs_an_explicit_choice() -> None:
    with pytest.raises(ValueError, match="neither repeated blocks nor activation modules in Linear"):
        FeatureFlow(nn.Linear(2, 2))


def test_a_near_miss_is_suggested() -> None:
    wrapped = nn.Sequential()
    wrapped.add_module("module", ResidualNet())
    with pytest.raises(ValueError, match=r"did you mean 'module\.stem'"):
        FeatureFlow(wrapped, ["stem"])


def test_describe_names_layers_shapes_stages_and_terms(capsys: pytest.CaptureFixture[str]) -> None:
    flow = FeatureFlow(ResidualNet(3), gradient=2.0, transition="pool", norm="l2")
    description = flow.describe(images())
    assert description.names == flow.layers
    assert description.shapes == [(2, 4, 8, 8)] * 3 + [(2, 4, 4, 4)] * 3
    assert description.stages == [[0, 1, 2], [3, 4, 5]]
    assert description.gradient == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert description.curvature == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert description.bytes == 3 * 2 * 4 * (64 + 16) * 4
    text = capsys.readouterr().out
    for words in (
        "early.0",
        "2x4x8x8",
        "5 gradient terms, weight 2: 0-1",
        "4 curvature terms",
        "norm l2",
        "pool",
    ):
        assert words in text


@pytest.mark.parametrize("transition", ["break", "pool"])
def test_describe_counts_the_terms_that_the_loss_has(transition: str) -> None:
    model = ResidualNet(3)
    with FeatureFlow(model, backend="reference", transition=transition) as flow:
        description = flow.describe(images())
        model(images())
        terms = flow.terms()
    assert len(description.gradient) == len(terms.gradient)
    assert len(description.curvature) == len(terms.curvature)


def test_describe_leaves_the_model_and_a_pending_forward_as_they_were() -> None:
    model = ResidualNet()
    model.late.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with FeatureFlow(model, backend="reference") as flow:
        flow.describe(images())
        assert [m.training for m in (model, model.early, model.late)] == [True, True, False]
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        model(images())
        flow.loss()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 3, 8, 8),), {"x": torch.ones(2, 3, 8, 8)}], ids=["tuple", "dict"]
)
def test_describe_takes_positional_and_keyword_inputs(inputs: Any) -> None:
    assert len(FeatureFlow(ResidualNet(2)).describe(inputs).names) == 4


def test_describe_refuses_what_it_cannot_call() -> None:
    with pytest.raises(TypeError, match="example_inputs"):
        FeatureFlow(ResidualNet(2)).describe("image.png")
