"""`select_features` and `Selection`: which channels, from one pass, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from explain_nets import conv_net, loader, with_statistics
from torch import Tensor, nn

from ffr_ext import compact, sparsity, zero_small_filters
from ffr_ext.explain import Selection, explain, feature_vectors, select_features


class Planted(nn.Module):
    """Layer "two": channel j + 1 is 1 exactly for class j, channel 0 always. Layer "one" is the same for all."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        label = x.flatten(1)[:, 0].long()
        self.one(torch.ones(len(x), 2, 4, 4))
        told = F.one_hot(label, self.classes).to(x)
        return self.two(torch.cat([torch.ones(len(x), 1), told], 1)[:, :, None, None].expand(-1, -1, 4, 4))[
            :, 1:, 0, 0
        ]


def planted_loader(classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(4 * classes) % classes
    return [(labels.float()[:, None].expand(-1, 2).contiguous(), labels)]


@pytest.mark.parametrize("mu", [0.5, 1.0, 10.0])
def test_a_planted_feature_is_the_one_selected_with_the_weight_worked_out_by_hand(mu: float) -> None:
    selection = select_features(Planted(), planted_loader(), layers=["two"], mu=mu)
    # The channel's share is 1/2 on its class, 0 elsewhere; channel 0 has 1/2 everywhere. 1/2 w = 1 needs w = 2.
    for j, name in enumerate("012"):
        of_class = [entry for entry in selection.entries if entry.class_name == name]
        assert [(entry.layer, entry.channel) for entry in of_class] == [("two", j + 1)]
        assert of_class[0].weight == pytest.approx(min(mu, 2.0), rel=1e-4)
    assert selection.channels("two") == [1, 2, 3]
    assert selection.fit.accuracy == 1
    assert selection.fit.residual == pytest.approx((1 - min(mu, 2.0) / 2) ** 2, abs=1e-6)


def test_a_layer_that_tells_nothing_is_not_selected() -> None:
    selection = select_features(Planted(), planted_loader(), layers=["one", "two"], mu=1.0)
    assert selection.layers == {"one": 2, "two": 4}
    assert selection.channels("one") == []


def test_vectors_are_shares_of_energy_and_zero_where_a_layer_is() -> None:
    net = conv_net()
    x = torch.rand(4, 3, 12, 12)
    nn.init.constant_(net[4].bias, -100)  # the second ReLU gives zeros
    selection = select_features(net, [(x, torch.tensor([0, 1, 2, 0]))], max_iterations=500_000)
    v = feature_vectors(net, x, selection)
    first = net[:3](x).detach().double().square().sum((2, 3))
    torch.testing.assert_close(v[:, :6], first / first.sum(1, keepdim=True))
    assert float(v[:, 6:].abs().max()) == 0


def test_the_selection_is_the_same_however_the_images_are_batched() -> None:
    net = with_statistics(conv_net())
    data = loader(batch=60)
    small = [(x, y) for images, labels in data for x, y in zip(images.split(7), labels.split(7), strict=True)]
    a, b = (select_features(net, batches, mu=2.0) for batches in (data, small))
    torch.testing.assert_close(a.weights, b.weights, atol=1e-7, rtol=0)
    assert a.fit.images == b.fit.images == 60


def test_a_sequence_of_bounds_gives_the_path() -> None:
    net = with_statistics(conv_net())
    path = select_features(net, loader(), mu=[5.0, 0.5])
    assert [s.mu for s in path] == [5.0, 0.5]
    for selection in path:
        alone = select_features(net, loader(), mu=selection.mu)
        assert torch.equal(alone.weights, selection.weights)
        assert float(selection.weights.sum(0).max()) <= selection.mu + 1e-9
    assert path[0].fit.residual < path[1].fit.residual


def test_predictions_can_stand_in_for_labels() -> None:
    net = with_statistics(conv_net())
    data = loader()
    told = [(x, net(x).argmax(1)) for x, _ in data]
    a = select_features(net, [x for x, _ in data], targets="predictions")
    b = select_features(net, told)
    assert torch.equal(a.weights, b.weights)


def test_a_module_that_is_called_twice_is_two_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu, self.head = (
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(4, 5, 3),
                nn.ReLU(),
                nn.Linear(5, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))

    net = Twice().eval()
    selection = select_features(net, loader())
    assert selection.layers == {"relu": 4, "relu:2": 5}
    assert selection.producers == {"relu": ("a.weight", 0), "relu:2": ("b.weight", 0)}
    assert explain(net, loader()[0][0], selection, target=1).heat.shape == (20, 12, 12)


def test_tokens_have_their_channels_last_unless_the_model_is_a_series() -> None:
    class Tokens(nn.Module):
        def __init__(self, embed: nn.Module) -> None:
            super().__init__()
            self.embed, self.act, self.head = embed, nn.GELU(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            series = isinstance(self.embed, nn.Conv1d)
            tokens = x if series else x.flatten(2).transpose(1, 2)
            return self.head(self.act(tokens).mean(2 if series else 1))

    data = loader()
    assert select_features(Tokens(nn.Conv2d(3, 6, 4, 4)), data).layers == {"act": 6}
    lines = [(x[:, :, 0], y) for x, y in data]
    assert select_features(Tokens(nn.Conv1d(3, 6, 3)), lines).layers == {"act": 6}
    assert select_features(Tokens(nn.Conv2d(3, 6, 4, 4)), data, channel_dim=1).layers == {"act": 9}


def test_it_is_written_as_json_and_read_back_to_the_bit(tmp_path: Path) -> None:
    net = with_statistics(conv_net())
    selection = select_features(net, loader(), classes=["red", "green", "blue"], skip_constant=True)
    selection.save(tmp_path / "selection.json")
    again = Selection.load(tmp_path / "selection.json")
    assert torch.equal(again.weights, selection.weights)
    assert again.to_json() == selection.to_json()
    assert again.entries == selection.entries
    assert "green" in again.table()
    assert "accuracy" in repr(again)
    for text, reason in (
        ("{}", "format"),
        ("[", "not JSON"),
        (selection.to_json().replace('"layers"', '"x"'), "damaged"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            Selection.load(tmp_path / "bad.json")


# --- pruning ----------------------------------------------------------------------------------------


def pruned_net(beta: float) -> nn.Sequential:
    """A net with dead filters in both layers; ``beta`` is what is left of their channels."""
    net = with_statistics(conv_net(stride=1))
    with torch.no_grad():
        for norm, dead in ((net[1], [1, 4]), (net[4], [0, 3, 6])):
            norm.weight[dead] = 0
            norm.bias[dead] = beta
            net[{id(net[1]): 0, id(net[4]): 3}[id(norm)]].weight[dead] = 0
    return net


def test_selections_and_heatmaps_are_the_same_before_and_after_compact() -> None:
    net = pruned_net(beta=-0.5)  # zeros behind the ReLU
    data = loader()
    result = compact(net, data[0][0][:2])
    small = result.model
    assert (small[0].weight.shape[0], small[3].weight.shape[0]) == (4, 5)
    before, after = (select_features(model, data, mu=3.0) for model in (net, small))
    carried = after.in_source(result.plan)
    assert carried.layers == before.layers
    torch.testing.assert_close(carried.weights, before.weights, atol=1e-6, rtol=0)
    assert not set(before.channels("2")) & {1, 4}
    assert not set(before.channels("5")) & {0, 3, 6}
    x = data[0][0]
    a, b, c = explain(net, x, carried), explain(small, x, after), explain(net, x, before)
    torch.testing.assert_close(a.heat, b.heat, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.parts, b.parts, atol=1e-5, rtol=0)
    torch.testing.assert_close(c.heat, b.heat, atol=1e-4, rtol=0)


def test_constant_channels_change_the_shares_unless_they_are_skipped() -> None:
    # No padding: the constants of dead channels are absorbed, so compact takes them out.
    net = pruned_net(beta=0.8)
    net[3].padding = (0, 0)
    data = loader()
    result = compact(net, data[0][0][:2])
    assert result.model[0].weight.shape[0] == 4
    assert result.model[3].weight.shape[0] == 5
    plain = [select_features(model, data, mu=3.0) for model in (net, result.model)]
    skipping = [select_features(model, data, mu=3.0, skip_constant=True) for model in (net, result.model)]
    for layer, dead in (("2", {1, 4}), ("5", {0, 3, 6})):
        assert dead <= set(skipping[0].skipped[layer])
    assert len(skipping[0].skipped["5"]) - len(skipping[1].skipped.get("5", [])) == 3
    carried = skipping[1].in_source(result.plan)
    assert carried.skipped == skipping[0].skipped
    torch.testing.assert_close(carried.weights, skipping[0].weights, atol=1e-6, rtol=0)
    assert float((plain[1].in_source(result.plan).weights - plain[0].weights).abs().max()) > 1e-3
    x = data[0][0]
    a, b = (
        explain(model, x, s).heat
        for model, s in zip((net, result.model), (carried, skipping[1]), strict=True)
    )
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_survivors_count_dead_and_selected_filters() -> None:
    net = pruned_net(beta=-0.5)
    data = loader()
    selection = select_features(net, data, mu=3.0)
    rows = selection.survivors(sparsity(net), net)
    assert [(row.layer, row.filters, row.dead, row.alive) for row in rows] == [("2", 6, 2, 4), ("5", 8, 3, 5)]
    for row in rows:
        assert row.alive_selected == row.selected == len(selection.channels(row.layer))
    # A report of counts does not say which filters are dead.
    assert {row.alive_selected for row in selection.survivors(sparsity(net))} <= {None, 0}
    # A filter that is selected although the threshold calls it dead:
    every = selection.survivors(sparsity(net, 1e3), net)
    assert [(row.dead, row.alive_selected) for row in every] == [(6, 0), (8, 0)]
    small = compact(net, data[0][0][:2]).model
    after = select_features(small, data, mu=3.0).survivors(sparsity(small))
    assert [(row.filters, row.dead, row.alive_selected) for row in after] == [
        (4, 0, rows[0].selected),
        (5, 0, rows[1].selected),
    ]


def test_survivors_mark_the_filters_that_zero_small_filters_would_zero() -> None:
    net = with_statistics(conv_net())
    threshold = 0.9
    selection = select_features(net, loader(), mu=[0.5])[0]
    rows = {row.layer: row for row in selection.survivors(sparsity(net, threshold), net)}
    for zeroed in zero_small_filters(copy.deepcopy(net), threshold):
        layer = {"0": "2", "3": "5"}.get(zeroed.layer)
        if layer is None:
            continue
        expected = len(set(selection.channels(layer)) - set(zeroed.filters))
        assert rows[layer].alive_selected == expected


def test_a_layer_whose_weight_is_not_known_is_named() -> None:
    net = with_statistics(conv_net(stride=1))
    result = compact(net, loader()[0][0][:2])
    selection = select_features(
        result.model, loader(), layers=["6"]
    )  # the pooling: made by norm 4, which has 8
    assert selection.in_source(result.plan).layers == {"6": 8}
    odd = select_features(result.model, loader(), layers=["8"])
    odd.producers.clear()
    with pytest.raises(ValueError, match=r"layer '8': which weight makes it is not known.*weights="):
        odd.in_source(result.plan)
    assert odd.in_source(result.plan, weights={"8": "8.weight"}).layers == {"8": 3}
    with pytest.raises(ValueError, match=r"has 3 channels, '3\.weight' keeps 8"):
        odd.in_source(result.plan, weights={"8": "3.weight"})


# --- refusals ---------------------------------------------------------------------------------------


def test_models_that_cannot_be_explained_are_refused_and_stay_as_they_were() -> None:
    data = loader()
    net = conv_net().train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"BatchNorm2d at '1'.*model\.eval"):
        select_features(net, data)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    with pytest.raises(ValueError, match=r"OptimizedModule.*_orig_mod"):
        select_features(torch.compile(conv_net()), data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(conv_net())
    with pytest.raises(ValueError, match="ScriptModule"):
        select_features(scripted, data)
    with pytest.raises(ValueError, match=r"Dropout at '1'.*random"):
        select_features(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), data)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        select_features(lambda x: x, data)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(layers=["nope"]), ValueError, "no module named 'nope'"),
        (dict(layers=["7"]), None, ""),
        (dict(mu=0.0), ValueError, "mu: expected a positive finite"),
        (dict(mu=[]), ValueError, "mu: expected"),
        (dict(mu="10"), TypeError, "mu: expected a number"),
        (dict(targets="logits"), ValueError, "targets: expected one of"),
        (dict(classes=2), ValueError, "labels from 0 to 2, expected 0 to 1"),
        (dict(classes="abc"), TypeError, "classes"),
        (dict(channel_dim=7), ValueError, "channel_dim: 7"),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, object], error: type[Exception] | None, message: str
) -> None:
    if error is None:
        select_features(conv_net(), loader(), **change)
        return
    with pytest.raises(error, match=message):
        select_features(conv_net(), loader(), **change)


def test_no_hook_stays_on_the_model_while_an_error_is_handled() -> None:
    net, data = conv_net(), loader()
    for wrong in (dict(classes=2), dict(classes="abc")):
        with pytest.raises((ValueError, TypeError)) as caught:
            select_features(net, data, **wrong)
        assert caught.tb is not None  # it keeps what ran alive
        assert not any(module._forward_hooks for module in net.modules())


def test_wrong_loaders_are_named() -> None:
    net, data = conv_net(), loader()
    x, y = data[0]
    for bad, message in (
        ([], "at least one image"),
        ([x], "batch 0 has no labels"),
        ([(x, y[:3])], "20 images and labels of shape"),
        ([(x, y.float())], "whole-number labels"),
        ([(x.to(torch.uint8), y)], "floating-point images"),
        ([data[0], (x * math.nan, y)], "batch 1 has NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            select_features(net, bad)
    with pytest.raises(TypeError, match="expected \\(images, labels\\)"):
        select_features(net, [{"x": x}])
    with pytest.raises(ValueError, match="read twice"):
        select_features(net, iter(data), skip_constant=True)
    with torch.no_grad():
        net[0].weight[2] = math.nan
    with pytest.raises(ValueError, match="'2' is NaN or infinite on batch 0"):
        select_features(net, data)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_that_is_not_called_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).mean((2, 3))

    with pytest.raises(ValueError, match="'b' was not called"):
        select_features(Unused(), loader())
