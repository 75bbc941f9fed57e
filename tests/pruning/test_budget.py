"""`prune_to`: the share that was asked for, exactly cut, from the weakest channels on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_models import Residual, fingerprint, settled
from pruning_nets import Net
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ffr_ext import compact
from ffr_ext.pruning import budget, channel_groups, prune_to
from ffr_ext.pruning.measure import count_flops, count_parameters

IMAGE = torch.randn(2, 3, 8, 8)


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    )


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.ConvTranspose2d(10, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def concatenated() -> nn.Module:
    return Net(
        lambda m, x: m.last(F.relu(torch.cat([m.a(x), m.b(x)], 1))),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(3, 10, 3),
        last=nn.Conv2d(18, 4, 1),
    )


NETS = {
    "chain": chain,
    "depthwise": depthwise,
    "grouped": grouped,
    "group norm": group_norm,
    "transposed": transposed,
    "concatenated": concatenated,
    "residual": Residual,
}


@pytest.mark.parametrize("by", ["flops", "parameters"])
@pytest.mark.parametrize("name", NETS)
def test_the_target_is_met_and_the_cut_is_exact(name: str, by: str) -> None:
    model = settled(NETS[name]())
    before = fingerprint(model)
    result = prune_to(model, IMAGE, **{by: 0.7}, measure=False)
    assert fingerprint(model) == before
    counts = {
        "flops": [count_flops(m, (IMAGE,), {}) for m in (model, result.model)],
        "parameters": [count_parameters(m) for m in (model, result.model)],
    }[by]
    assert 0.4 < counts[1] / counts[0] <= 0.7
    with torch.no_grad():
        zeroed = without(model, result)
        torch.testing.assert_close(result.model(IMAGE), zeroed(IMAGE), rtol=1e-5, atol=1e-6)
    assert not result.report.replaced


def without(model: nn.Module, result: Any) -> nn.Module:
    """The model with what left set to zero, channel by channel: the filters that are not kept, their scales, biases."""
    other = copy.deepcopy(model)
    groups = channel_groups(other, IMAGE, "all")
    gone = torch.zeros(len(groups), dtype=torch.bool)
    for axis in groups.layers():
        cut = [c.keep for c in result.plan.cuts.get(axis.name, []) if c.dim == axis.dim]
        if cut:
            kept = torch.zeros(axis.groups.numel(), dtype=torch.bool)
            kept[list(cut[0])] = True
            gone[axis.groups[~kept]] = True
    groups.zero_(gone)
    return other


@pytest.mark.parametrize("energy", ["paper", "effective", "scale"])
@pytest.mark.parametrize("name", NETS)
def test_every_energy_leads_to_the_target(name: str, energy: str) -> None:
    model = settled(NETS[name]())
    for normalize in ("none", "mean"):
        result = prune_to(model, IMAGE, flops=0.75, energy=energy, normalize=normalize, measure=False)
        assert 0.4 < result.report.flops[1] / result.report.flops[0] <= 0.75


def test_the_weakest_of_all_layers_leave_first() -> None:
    model = settled(Residual())
    groups = channel_groups(model, IMAGE)
    energies = groups.energies(include_norm=False)
    result = prune_to(model, IMAGE, flops=0.8, measure=False)
    kept = {
        f"blocks.{b}": set(next(c.keep for c in result.plan.cuts[f"blocks.{b}.conv1.weight"] if c.dim == 0))
        for b in (0, 1)
    }
    gone = [i not in kept[g.slices[0][0][:8]] for g, i in zip(groups, [*range(12), *range(12)], strict=True)]
    left = torch.tensor(gone)
    assert 0 < int(left.sum()) < 12
    assert float(energies[left].max()) < float(energies[~left].min())


def test_one_channel_more_would_have_been_too_many() -> None:
    """The share is met by the shortest prefix: with the strongest of those that left, it would not be."""
    model = settled(Residual())
    share = prune_to(model, IMAGE, flops=0.8, measure=False).report
    per_channel = (
        2 * 2 * 64 * 9 * 8 * 2 / share.flops[0]
    )  # two 3x3 convolutions of 8 channels, 8x8 places, batch 2
    assert 0.8 - per_channel < share.flops[1] / share.flops[0] <= 0.8


def test_a_layer_keeps_what_the_cap_and_the_minimum_say() -> None:
    model = settled(chain())
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    small = prune_to(model, IMAGE, flops=0.7, cap=0.25, measure=False).model
    widths = [m.weight.shape[0] for m in small if hasattr(m, "weight")]
    assert widths[0] == 6
    assert all(w >= 0.75 * full for w, full in zip(widths, [8, 8, 12, 20, 4], strict=True))
    fewest = prune_to(model, IMAGE, flops=0.37, cap=1.0, min_channels=5, measure=False).model
    assert fewest[0].out_channels == 5
    assert min(fewest[3].out_channels, fewest[7].out_features) >= 5


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise"])
def test_channel_counts_that_change_are_multiples(name: str) -> None:
    model = settled(NETS[name]())
    result = prune_to(model, IMAGE, flops=0.8, round_to=4, measure=False)
    shapes = dict(result.model.named_parameters())
    changed = 0
    for axis in channel_groups(model, IMAGE).layers():
        width = shapes[axis.name].shape[axis.dim]
        assert width % 4 == 0 or width == axis.groups.numel()
        changed += width != axis.groups.numel()
    assert changed
    assert result.report.flops[1] <= 0.8 * result.report.flops[0]


def test_the_default_device_does_not_matter() -> None:
    model = settled(chain())
    for energy in ("paper", "effective"):
        expected = prune_to(model, IMAGE, flops=0.7, energy=energy, measure=False).plan.digest()
        with torch.device("meta"):
            found = prune_to(model, IMAGE, flops=0.7, energy=energy, normalize="mean", measure=False)
            plain = prune_to(model, IMAGE, flops=0.7, energy=energy, measure=False)
        assert plain.plan.digest() == expected
        assert found.report.flops[1] <= 0.7 * found.report.flops[0]


def test_both_targets_are_met() -> None:
    result = prune_to(settled(chain()), IMAGE, flops=0.9, parameters=0.5, measure=False)
    assert result.report.flops[1] <= 0.9 * result.report.flops[0]
    assert result.report.parameters[1] <= 0.5 * result.report.parameters[0]


def test_channels_that_additions_couple_leave_with_scope_all() -> None:
    model = settled(Residual())
    inner = prune_to(model, IMAGE, flops=0.8, measure=False).model
    everything = prune_to(model, IMAGE, flops=0.35, scope="all", measure=False).model
    assert inner.stem[0].out_channels == 8
    assert everything.stem[0].out_channels < 8
    assert everything.head.in_features == everything.stem[0].out_channels


def test_a_score_of_ones_own_decides() -> None:
    model = settled(chain())
    groups = channel_groups(model, IMAGE)
    score = torch.arange(len(groups), 0, -1)  # the last layer's channels are the weakest
    small = prune_to(model, IMAGE, parameters=0.8, energy=score, cap=1.0, measure=False).model
    assert small[0].out_channels == 8
    assert small[7].out_features < 20
    torch.testing.assert_close(small[7].weight, model[7].weight[: small[7].out_features])


def test_channels_behind_a_sigmoid_leave_only_where_their_constant_is_absorbed() -> None:
    """sigmoid(0) is no zero: an unpadded convolution takes it up in its bias, a padded one cannot, and then the others
    have to make up for it."""
    model = settled(
        nn.Sequential(
            nn.Conv2d(3, 12, 1),
            nn.Sigmoid(),
            nn.Conv2d(12, 12, 1),
            nn.Sigmoid(),
            nn.Conv2d(12, 4, 3, padding=1),
        )
    )
    result = prune_to(model, IMAGE, flops=0.75, cap=1.0, measure=False)
    assert result.model[2].out_channels == 12
    assert result.model[0].out_channels < 12
    assert result.report.flops[1] <= 0.75 * result.report.flops[0]
    with pytest.raises(ValueError, match="cannot be reached"):
        prune_to(model, IMAGE, flops=0.3, cap=1.0, measure=False)


def test_dead_channels_leave_first_and_count() -> None:
    model = settled(chain())
    with torch.no_grad():
        model[3].weight[:3] = 0
        model[3].bias[:3] = 0
    result = prune_to(model, IMAGE, flops=1.0, measure=False)
    assert result.model[3].out_channels == 9
    assert result.model[0].out_channels == 8


def with_dead_constants() -> nn.Module:
    """Four of eight channels are 0.3, in front of a padded convolution: three leave, and one carries them all."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight[:4] = 0
        model[0].weight[:4] = 0
        model[1].bias[:4] = 0.3
    return model.eval()


@pytest.mark.parametrize(("flops", "options"), [(0.3, {}), (0.5, {"cap": 1.0, "round_to": 4})])
def test_the_carrier_of_dead_constants_is_not_taken_for_a_channel_that_may_leave(
    flops: float, options: dict[str, Any]
) -> None:
    """Another of the dead ones would have to stay in its place."""
    before, after = prune_to(
        with_dead_constants(), IMAGE, flops=flops, scope="all", measure=False, **options
    ).report.flops
    assert after <= flops * before


def test_where_the_cut_leaves_more_than_was_counted_the_message_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Absorbed constants make biases that nobody counted. One cut is enough to find out."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 40, 1, bias=False))
    cuts = []
    monkeypatch.setattr(budget, "compact", lambda *a, **k: cuts.append(1) or compact(*a, **k))
    with pytest.raises(ValueError, match=r"the least is 0\.5;"):
        prune_to(model, IMAGE, parameters=0.01, measure=False)
    with pytest.raises(
        ValueError, match=r"parameters: 0\.5 of the model .* leaves 0\.6136 of the parameters"
    ) as error:
        prune_to(model, IMAGE, parameters=0.5, measure=False)
    assert len(cuts) == 1
    assert "raise cap" in str(error.value)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_same_optimizer_goes_on_through_several_rounds(inplace: bool) -> None:
    torch.manual_seed(1)
    model: nn.Module = settled(chain()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    y = torch.tensor([0, 1])

    def steps(count: int) -> float:
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(IMAGE), y)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    first = steps(5)
    for target in (0.8, 0.75):
        momentum = optimizer.state[model[9].weight]["momentum_buffer"].clone()
        result = prune_to(model, IMAGE, flops=target, optimizer=optimizer, inplace=inplace, measure=False)
        assert (result.model is model) == inplace
        model = result.model
        assert model.training
        kept = next(
            (c.keep for c in result.plan.cuts.get("9.weight", []) if c.dim == 1), range(momentum.shape[1])
        )
        torch.testing.assert_close(
            optimizer.state[model[9].weight]["momentum_buffer"], momentum[:, list(kept)]
        )
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
            id(p) for p in model.parameters()
        }
        assert steps(5) < first


def test_half_the_flops_of_a_transformer_block_come_from_its_inner_layer() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    result = prune_to(encoder, torch.randn(2, 5, 16), parameters=0.75, cap=1.0, measure=False)
    assert result.model.linear1.out_features < 64
    assert result.report.parameters[1] <= 0.75 * result.report.parameters[0]


# --- what cannot be -------------------------------------------------------------------------------------


def test_attention_that_torch_would_fuse_in_evaluation_is_counted() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    batch, length, width = 3, 5, 16
    products = 4 * batch * length * width * width + 2 * batch * length * length * width
    assert count_flops(Attends().eval(), (torch.randn(batch, length, width),), {}) == 2 * products
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformer_encoder_of_torch_is_cut_to_its_flops() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, batch_first=True)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2)), torch.randn(4, 10, 6)
    with FlopCounterMode(display=False) as counter:
        model(x)
    before, after = prune_to(model.eval(), x, flops=0.8).report.flops
    assert before == counter.get_total_flops() > 2 * 2 * 40 * (4 * 16 * 16 + 2 * 16 * 64)
    assert after <= 0.8 * before


def test_an_lstm_is_counted() -> None:
    x = torch.randn(2, 20, 6)
    assert count_flops(nn.LSTM(6, 8, batch_first=True), (x,), {}) == 2 * 2 * 20 * (6 + 8) * 4 * 8


def test_an_unreachable_target_says_what_is_reachable_and_changes_nothing() -> None:
    model = settled(Residual())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = fingerprint(model)
    message = r"flops: 0\.1 of the model cannot be reached; with cap=0\.5.*the least is 0\.5\d"
    with pytest.raises(ValueError, match=message) as error:
        prune_to(model, IMAGE, flops=0.1, optimizer=optimizer)
    assert str(error.value).endswith("; raise cap or prune in several rounds or take scope='all'")
    least = float(str(error.value).split("the least is ")[1].split(";")[0])
    result = prune_to(model, IMAGE, flops=least, measure=False)
    assert result.report.flops[1] / result.report.flops[0] == pytest.approx(least, abs=1e-4)
    assert fingerprint(model) == before
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_an_unreachable_target_advises_only_what_was_not_done() -> None:
    with pytest.raises(ValueError, match=r"the least is [\d.]+$"):
        prune_to(settled(Residual()), IMAGE, flops=1e-4, cap=1.0, scope="all", min_channels=2)


def test_a_residual_stream_alone_is_refused_with_the_scope_that_takes_it() -> None:
    model = Net(
        lambda m, x: m.head(m.a(x) + m.b(x)), a=nn.Linear(8, 6), b=nn.Linear(8, 6), head=nn.Linear(6, 3)
    )
    with pytest.raises(ValueError, match="scope='all' finds 6, which additions couple"):
        prune_to(model, torch.randn(2, 8), flops=0.5)
    assert prune_to(model, torch.randn(2, 8), flops=0.5, scope="all").report.flops[1] > 0


def test_weights_that_are_not_finite_are_named() -> None:
    model = settled(Residual())
    with torch.no_grad():
        model.blocks[1].conv1.weight[2] = math.nan
    with pytest.raises(ValueError, match=r"energy: that of channel group 14 \(blocks\.1\.conv1\.weight\[2\]"):
        prune_to(model, IMAGE, flops=0.8)


def test_a_model_without_channels_to_take_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no channel that may leave: 4 filters stay: an output of the model"):
        prune_to(nn.Linear(8, 4), torch.randn(2, 8), flops=0.5)
    model = Net(lambda m, x: m.b(torch.fft.fft(m.a(x)).real), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    with pytest.raises(
        ValueError, match="fft_fft in the model's own forward is an op that is not known here"
    ):
        prune_to(model, torch.randn(2, 8), flops=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "flops, parameters: expected the share to keep of one of them"),
        ({"flops": 0.0}, ValueError, r"flops: expected a share in \(0, 1\], got 0.0"),
        ({"flops": math.nan}, ValueError, "flops: expected a share"),
        ({"parameters": 1.5}, ValueError, "parameters: expected a share"),
        ({"flops": "half"}, TypeError, "flops: expected a number, got 'half'"),
        ({"flops": 0.5, "cap": 0}, ValueError, "cap: expected a share"),
        ({"flops": 0.5, "energy": "raw"}, ValueError, "energy: expected one of 'paper'"),
        (
            {"flops": 0.5, "energy": torch.ones(3)},
            ValueError,
            "energy: expected one number for each of the 24",
        ),
        ({"flops": 0.5, "normalize": "max"}, ValueError, "normalize: expected one of 'none', 'mean'"),
        ({"flops": 0.5, "scope": "outer"}, ValueError, "scope: expected one of"),
        ({"flops": 0.5, "min_channels": 0}, ValueError, "min_channels: expected a whole number"),
        ({"flops": 0.5, "round_to": 1.5}, ValueError, "round_to: expected a whole number"),
        (
            {"flops": 0.5, "optimizer": torch.optim.SGD},
            TypeError,
            "optimizer: expected the torch.optim.Optimizer",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prune_to(Residual(), IMAGE, **options)


def test_the_counted_costs_are_the_measured_ones() -> None:
    from ffr_ext.pruning.graph import Analysis, Options, Solver, trace
    from ffr_ext.pruning.graph.groups.costs import Costs

    for make in NETS.values():
        model = make().eval()
        solver = Solver(Analysis(trace(model, (IMAGE,), {}), strict=True), Options())
        whole = {"flops": count_flops(model, (IMAGE,), {}), "parameters": count_parameters(model)}
        costs = Costs(solver, whole)
        assert all(rest == pytest.approx(0) for rest in costs._rest.values())
