"""`sparsity` and `zero_small_filters`: what counts as dead, on a measure that rescaling does not fool."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from pruning_models import Residual, X, dead, difference
from torch import Tensor, nn
from torch.nn.utils import prune

from ffr_ext import compact, sparsity, zero_small_filters
from ffr_ext.pruning.scale import pair_by_graph, pair_by_structure


def test_counts_by_layer_and_in_total() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].weight[3, 0, 0, 0] = 0
        model[3].weight[4] = 0
    report = sparsity(model)
    first = report["0"]
    assert (first.weights, first.zero_weights, first.filters, first.zero_filters) == (108, 55, 4, 2)
    assert (first.kind, first.parameters, first.flops, first.norm) == ("Conv2d", 112, None, None)
    assert (report.filters, report.zero_filters) == (9, 3)
    assert (report.weights, report.zero_weights) == (108 + 720, 55 + 144)
    assert report.total.parameters == sum(p.numel() for p in model.parameters())
    assert first.filter_sparsity == 0.5
    assert [layer.name for layer in report] == ["0", "3"]
    with pytest.raises(KeyError):
        report["1"]


def test_the_table_and_the_data_agree() -> None:
    report = sparsity(dead(), example_inputs=torch.randn(X))
    text = str(report)
    for layer in report:
        assert any(line.startswith(layer.name) and f"{layer.weights:,}" in line for line in text.splitlines())
    assert f"{report.total.flops:,}" in text
    assert json.loads(json.dumps(report.to_dict()))["total"]["zero_filters"] == 10
    assert report["blocks.0.conv1"].flops == 2 * 2 * 64 * 12 * 8 * 9
    assert report["blocks.0.conv1"].norm == "blocks.0.bn1"


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_rescaling_with_the_statistics_changes_no_decision(factor: float) -> None:
    """A filter (or its inputs) times c, mean times c, variance times c^2: the channel after the norm is the
    same but for eps, which is why eps is small here and the factors are not extreme."""
    model = dead(filters=0)
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        for m in (model, rescaled):
            for norm in m.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eps = 1e-12
                    norm.weight.copy_(torch.linspace(0.001, 0.1, norm.num_features))
        for block in rescaled.blocks:
            block.conv1.weight *= factor
            block.bn1.running_mean *= factor
            block.bn1.running_var *= factor**2
    assert sparsity(model, 0.05).to_dict() == sparsity(rescaled, 0.05).to_dict()
    assert sparsity(model, 0.05).zero_filters > 0
    assert [z.filters for z in zero_small_filters(model, 0.05)] == [
        z.filters for z in zero_small_filters(rescaled, 0.05)
    ]


def test_the_scale_is_the_deviation_after_the_norm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, eps=0.5)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-2.0, 1.0, 0.1]))
        model[1].running_var.copy_(torch.tensor([0.5, 0.0, 4.5]))
    (zeroed,) = zero_small_filters(model, 10.0)
    torch.testing.assert_close(
        torch.tensor(zeroed.scales), torch.tensor([2.0 * 0.5**0.5, 0.0, 0.1 * 0.9**0.5])
    )


def test_zeroing_is_exact_in_place_and_once() -> None:
    model = dead(filters=0)
    with torch.no_grad():
        model.blocks[0].bn1.weight[:4] = torch.tensor([1e-3, -1e-3, 5e-3, 0.5])
    before = sparsity(model, 1e-2)
    zeroed = zero_small_filters(model, 1e-2)
    assert [(z.layer, z.norm, z.filters) for z in zeroed] == [("blocks.0.conv1", "blocks.0.bn1", (0, 1, 2))]
    assert (model.blocks[0].conv1.weight[:3] == 0).all()
    assert (model.blocks[0].bn1.weight[:3] == 0).all()
    assert (model.blocks[0].bn1.bias[:3] != 0).all(), "beta is what is left of the channel"
    assert sparsity(model).zero_filters == before.zero_filters == 3
    assert zero_small_filters(model, 1e-2) == []


def test_without_a_norm_the_filter_s_own_norm_counts() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0, 4.0], [3e-3, 0.0, 4e-3]]))
        model[2].weight.fill_(1.0)
    (zeroed,) = zero_small_filters(model, 5.1e-3)
    assert (zeroed.layer, zeroed.norm, zeroed.filters) == ("0", None, (1,))


def test_a_dry_run_gives_the_curve_and_changes_nothing() -> None:
    model = dead()
    with torch.no_grad():
        for block in model.blocks:
            block.bn1.weight[5:].copy_(torch.linspace(0.01, 1.0, 7))
    before = copy.deepcopy(model.state_dict())
    curve = zero_small_filters(model, [0.3, 0.0, 0.1], example_inputs=torch.randn(X), dry_run=True)
    assert [p.threshold for p in curve] == [0.0, 0.1, 0.3]
    assert [p.filters for p in curve] == sorted(p.filters for p in curve)
    assert curve[0].filters < curve[-1].filters
    assert curve[0].parameters == compact(model, torch.randn(X), measure=False).report.parameters[1]
    assert curve[-1].parameters < curve[0].parameters
    assert curve[-1].flops < curve[0].flops
    assert curve[-1].error > curve[0].error == 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    (point,) = zero_small_filters(model, 0.1, dry_run=True)
    assert (point.filters, point.parameters, point.error) == (curve[1].filters, None, None)


# ---------------------------------------------------------------------------------------------------
# Which norm is behind which layer
# ---------------------------------------------------------------------------------------------------


class PreActivation(nn.Module):
    """bn1 in front of conv1, bn2 between: the order of use is not "conv, then its norm"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Undecided(nn.Module):
    """A forward that torch.fx cannot trace, so that only names and sizes are left to go by."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.other = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv3, self.last = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.last(self.conv3(self.other(self.conv2(self.bn1(self.conv1(x))))))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.bn(y)


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (PreActivation(), {"conv1": "bn2"}),
        (Undecided(), {"conv1": "bn1", "conv3": "last"}),
        (TwoReaders(), {}),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), {}),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), {"0.0": "1"}),
    ],
    ids=["pre-activation", "by-names-and-sizes", "two-readers", "relu-between", "nested"],
)
def test_pairs_by_structure(model: nn.Module, pairs: dict[str, str]) -> None:
    assert pair_by_structure(model) == pairs


def test_structure_and_graph_agree() -> None:
    model = Residual().eval()
    expected = {"stem.0": "stem.1"} | {
        f"blocks.{i}.conv{j}": f"blocks.{i}.bn{j}" for i in (0, 1) for j in (1, 2)
    }
    assert pair_by_structure(model) == pair_by_graph(model, torch.randn(X)) == expected


@pytest.mark.parametrize("part", [slice(None, -1), slice(0, 3), slice(1, -1)])
@pytest.mark.parametrize("kind", [nn.ModuleList, lambda layers: nn.Sequential(*layers)])
def test_the_graph_knows_the_layers_of_a_part(kind: Any, part: slice) -> None:
    """`for layer in self.layers[:-1]`, as in YOLO."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Identity(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)]
            self.layers = kind(layers)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[part]:
                x = layer(x)
            return self.layers[-1](x)

    report = sparsity(Parts().eval(), example_inputs=torch.randn(X))
    assert [(layer.name, layer.norm) for layer in report.layers] == [
        ("layers.1", "layers.2"),
        ("layers.3", None),
    ]


@pytest.mark.parametrize("name", ["resnet-bottleneck", "mobilenet-v2", "efficientnet"])
def test_structure_and_graph_agree_on_models_of_others(name: str) -> None:
    pytest.importorskip("transformers")
    from pruning_zoo import ZOO

    make, inputs = ZOO[name]
    model = make().eval()
    by_graph = pair_by_graph(model, inputs())
    assert by_graph
    assert pair_by_structure(model) == by_graph


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sparsity(dead(), -1.0),
            ValueError,
            "threshold: expected a finite number of at least 0, got -1",
        ),
        (lambda: sparsity(dead(), float("nan")), ValueError, "threshold"),
        (
            lambda: sparsity(dead(), float("inf")),
            ValueError,
            "threshold: expected a finite number of at least 0, got inf",
        ),
        (lambda: sparsity(dead(), "0.1"), TypeError, "threshold: expected a number, got str"),
        (
            lambda: zero_small_filters(dead(), [0.1]),
            TypeError,
            "threshold: expected a number, got list; several thresholds are for dry_run=True",
        ),
        (
            lambda: zero_small_filters(dead(), torch.ones(2)),
            TypeError,
            "got Tensor; several thresholds are for dry_run=True",
        ),
        (lambda: zero_small_filters(dead(), "0.1"), TypeError, "threshold: expected a number, got str$"),
        (lambda: zero_small_filters(dead(), True), TypeError, "threshold: expected a number, got bool"),
        (lambda: zero_small_filters(dead(), torch.tensor(float("nan"))), ValueError, "threshold.*got nan"),
        (lambda: zero_small_filters(dead(), np.float32("inf")), ValueError, "threshold.*finite.*got inf"),
        (lambda: zero_small_filters(dead(), np.float64(-1)), ValueError, "threshold.*at least 0, got -1"),
        (lambda: zero_small_filters(dead(), None, dry_run=True), TypeError, "threshold.*got NoneType"),
        (lambda: zero_small_filters(dead(), [[0.1]], dry_run=True), TypeError, "threshold.*got list"),
        (lambda: zero_small_filters(dead(), [0.1, float("inf")], dry_run=True), ValueError, "finite"),
        (
            lambda: sparsity(dead(), example_inputs=torch.randn(X).to_sparse()),
            ValueError,
            "example_inputs: expected dense.*sparse_coo",
        ),
        (
            lambda: zero_small_filters(dead(), 0.1, example_inputs={"x": torch.randn(X).to_sparse()}),
            ValueError,
            "example_inputs: expected dense.*sparse_coo",
        ),
        (
            lambda: sparsity(dead(), example_inputs=torch.randn(1, 1, 8, 8)),
            ValueError,
            "^torch.export could not trace Residual with these example_inputs",
        ),
        (lambda: sparsity(None), TypeError, "model: expected an nn.Module"),
    ],
)
def test_refusals(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "threshold",
    [np.float32(0.9), np.float64(0.9), torch.tensor(0.9), torch.tensor(0.9, requires_grad=True)],
    ids=["float32", "float64", "tensor", "parameter"],
)
@pytest.mark.filterwarnings("error")
def test_a_threshold_may_come_from_numpy_or_torch(threshold: Any) -> None:
    model = dead()
    same = copy.deepcopy(model)
    points = zero_small_filters(model, threshold, dry_run=True)
    assert (
        points[0].filters == sparsity(model, threshold).zero_filters == sparsity(model, 0.9).zero_filters > 0
    )
    assert zero_small_filters(model, threshold) == zero_small_filters(same, 0.9) != []


@pytest.mark.parametrize("kind", ["weight_norm", "parametrization", "mask"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_cannot_be_zeroed(kind: str) -> None:
    """Zeros written to it would be gone at the next access or call."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    if kind == "weight_norm":
        nn.utils.weight_norm(model[2])
    elif kind == "parametrization":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        prune.random_unstructured(model[2], "weight", 0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model: 2\.weight is no parameter but computed.*remove_"):
        zero_small_filters(model, 100.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert zero_small_filters(model, 0.0) == []


@pytest.mark.parametrize("of", ["layer", "norm"])
def test_a_weight_that_is_a_buffer_is_zeroed(of: str) -> None:
    """A frozen weight is in the module as a parameter is, and keeps what is written to it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    frozen = model[0 if of == "layer" else 1]
    weight = frozen.weight.detach().clone()
    del frozen.weight
    frozen.register_buffer("weight", weight)
    with torch.no_grad():
        model[1].weight[:3] = 1e-4
    (zeroed,) = zero_small_filters(model, 1e-3)
    assert (zeroed.layer, zeroed.norm, zeroed.filters) == ("0", "1", (0, 1, 2))
    state = model.state_dict()
    assert not state["0.weight"][:3].any()
    assert state["0.weight"][3].any()
    assert state["1.weight"].tolist() == [0, 0, 0, 1]


def test_zeroed_filters_leave_exactly() -> None:
    """The whole way: small, zeroed, compact. Constants behind a padded convolution stay, everything else
    goes."""
    model = dead(filters=0)
    with torch.no_grad():
        for block in model.blocks:
            block.bn1.weight[:6] = 1e-4
            block.bn1.bias[:4] = -0.5
            block.bn1.bias[4:6] = 0.5
    zero_small_filters(model, 1e-3)
    result = compact(model, torch.randn(X), measure=False)
    assert [b.conv1.out_channels for b in result.model.blocks] == [7, 7]
    assert difference(model, result.model) < 1e-6
    assert "cannot absorb: it is no bias at the zero-padded border" in result.report.explain()
