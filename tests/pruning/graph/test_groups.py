"""`channel_groups`: which channels leave together, in every kind of coupling."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_models import Residual, fingerprint
from pruning_nets import Net
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ffr_ext.pruning import channel_groups, compact

IMAGE = torch.randn(2, 3, 8, 8)


def by_hand(model: nn.Module, groups: Any) -> Tensor:
    """Sums of squares over the slices of weights and of norms' scales, one slice at a time."""
    tensors = dict(model.named_parameters())
    scales = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    }

    def counts(name: str) -> bool:
        return name in tensors and (name in scales or tensors[name].dim() > 1)

    sums = [
        sum((tensors[n].detach().double().select(d, i) ** 2).sum() for n, d, i in g.slices if counts(n))
        for g in groups
    ]
    return torch.stack([torch.as_tensor(s) for s in sums])


def axes(group: Any) -> set[tuple[str, int]]:
    return {(name, dim) for name, dim, _ in group.slices}


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 4, 1))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1)
    )


def concatenated() -> nn.Module:
    return Net(
        lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 5, 1),
        last=nn.Conv2d(9, 4, 1),
    )


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(45, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


def tied() -> nn.Module:
    """Two linear layers of one weight, whose outputs lie side by side."""
    net = Net(
        lambda m, x: m.head(F.relu(torch.cat([m.a(x), m.b(-x)], 1))),
        a=nn.Linear(8, 6),
        b=nn.Linear(8, 6),
        head=nn.Linear(12, 3),
    )
    net.b.weight = net.a.weight
    return net


class Coupled(nn.Module):
    """Two layers that an addition couples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x) + self.b(x)))


CASES = {
    "chain": (chain, IMAGE),
    "depthwise": (depthwise, IMAGE),
    "grouped": (grouped, IMAGE),
    "concatenated": (concatenated, IMAGE),
    "flattened": (flattened, IMAGE),
    "residual": (Residual, IMAGE),
    "tied": (tied, torch.randn(2, 8)),
    "coupled": (Coupled, torch.randn(2, 8)),
}


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("name", CASES)
def test_energies_are_sums_of_squares_over_the_slices(name: str, scope: str) -> None:
    make, x = CASES[name]
    model = make()
    before = fingerprint(model)
    groups = channel_groups(model, x, scope)
    assert fingerprint(model) == before
    energies = groups.energies()
    assert energies.shape == (len(groups),)
    assert energies.dtype == torch.float32
    if len(groups):
        torch.testing.assert_close(energies.double(), by_hand(model, groups), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "scope", "families"),
    [
        pytest.param("chain", "inner", [6], id="chain: the last layer's filters are outputs"),
        pytest.param("residual", "inner", [12, 12], id="residual: what the blocks add is in no inner group"),
        pytest.param("residual", "all", [8, 12, 12], id="residual: the stream is one family"),
        pytest.param("depthwise", "inner", [6], id="depthwise: it makes no channels of its own"),
        pytest.param("grouped", "inner", [8, 12], id="grouped"),
        pytest.param("concatenated", "inner", [4, 5], id="concatenated: two layers, two families"),
        pytest.param("flattened", "inner", [5, 7], id="flattened: one group a channel, not a position"),
        pytest.param("tied", "inner", [6], id="tied: one weight makes one set of channels"),
        pytest.param("coupled", "inner", [], id="coupled: two weights make each channel"),
        pytest.param("coupled", "all", [6], id="coupled, all"),
    ],
)
def test_channels_of_one_layer_share_a_family(name: str, scope: str, families: list[int]) -> None:
    make, x = CASES[name]
    groups = channel_groups(make(), x, scope)
    sizes = Counter(group.family for group in groups)
    assert [sizes[f] for f in sorted(sizes)] == families
    assert len(groups) == sum(families) == len(list(groups))


def test_an_inner_channel_of_a_residual_block_is_all_that_leaves_with_it() -> None:
    groups = channel_groups(Residual(), IMAGE)
    norm = [("blocks.0.bn1." + n, 0) for n in ("weight", "bias", "running_mean", "running_var")]
    assert axes(groups[3]) == {("blocks.0.conv1.weight", 0), ("blocks.0.conv2.weight", 1), *norm}
    assert {index for _, _, index in groups[3].slices} == {3}


def test_a_channel_of_the_stream_has_an_axis_in_every_block() -> None:
    found = axes(channel_groups(Residual(), IMAGE, "all")[0])
    weights = {(n, d) for n, d in found if n.endswith(("conv1.weight", "conv2.weight"))}
    assert weights == {(f"blocks.{b}.{c}.weight", d) for b in (0, 1) for c, d in (("conv1", 1), ("conv2", 0))}
    assert {("stem.0.weight", 0), ("head.weight", 1)} <= found


def test_a_channel_behind_a_flatten_has_all_its_positions() -> None:
    slices = channel_groups(flattened(), IMAGE)[2].slices
    assert [i for name, dim, i in slices if (name, dim) == ("4.weight", 1)] == list(range(18, 27))


def test_a_depthwise_convolution_passes_channels_on() -> None:
    slices = channel_groups(depthwise(), IMAGE)[1].slices
    assert [i for name, dim, i in slices if (name, dim) == ("1.weight", 0)] == [2, 3]
    assert [i for name, dim, i in slices if (name, dim) == ("3.weight", 1)] == [2, 3]


def test_a_tied_weight_counts_once_and_its_channel_is_read_wherever_it_goes() -> None:
    (group, *_) = channel_groups(tied(), torch.randn(2, 8))
    assert [s for s in group.slices if s[0].endswith("weight")] == [
        ("a.weight", 0, 0),
        ("head.weight", 1, 0),
        ("head.weight", 1, 6),
    ]


def test_concatenation_keeps_two_layers_apart_and_finds_where_they_are_read() -> None:
    groups = channel_groups(concatenated(), IMAGE)
    assert [s for s in groups[4].slices if s[0] != "b.bias"] == [("b.weight", 0, 0), ("last.weight", 1, 4)]


def test_zeroing_the_slices_of_a_group_lets_compact_take_it_out() -> None:
    model = Residual().eval()
    groups = channel_groups(model, IMAGE, "all")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gone = [1, 9, 12, 30]
    with torch.no_grad():
        for group in gone:
            for name, dim, index in groups[group].slices:
                tensors[name].select(dim, index).zero_()
    result = compact(model, IMAGE, measure=False)
    assert [len(channel_groups(result.model, IMAGE, s)) for s in ("all", "inner")] == [32 - 4, 24 - 3]


def test_scales_and_readers_can_be_left_out() -> None:
    model = chain()
    groups = channel_groups(model, IMAGE)
    rows = model[0].weight.detach().flatten(1).square().sum(1)
    torch.testing.assert_close(groups.energies(include_norm=False, separated=True), rows)
    torch.testing.assert_close(groups.energies(separated=True), rows + 1)


def test_energies_follow_the_weights_and_show_nan() -> None:
    model = chain()
    groups = channel_groups(model, IMAGE)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[3].weight[0, 5] = float("nan")
    energies = groups.energies()
    assert bool(energies[5].isnan())
    assert not bool(energies[:5].isnan().any())
    torch.testing.assert_close(energies[:5].double(), by_hand(model, groups)[:5])
    assert groups.energies().dtype == torch.float32
    assert channel_groups(model.double(), IMAGE.double()).energies().dtype == torch.float64
    half = chain().bfloat16()
    assert channel_groups(half, IMAGE.bfloat16()).energies().dtype == torch.float32


def test_what_has_to_stay_is_in_no_group_and_the_reason_is_kept() -> None:
    groups = channel_groups(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    assert len(groups) == 0
    assert groups.energies().numel() == 0
    assert groups.pinned == {"an output of the model": 4}
    assert (
        len(channel_groups(nn.Sequential(weight_norm(nn.Linear(8, 4)), nn.Linear(4, 2)), torch.randn(2, 8)))
        == 0
    )


def test_an_unknown_op_is_named() -> None:
    model = Net(lambda m, x: m.b(torch.fft.fft(m.a(x)).real), a=nn.Linear(8, 6), b=nn.Linear(6, 3))
    groups = channel_groups(model, torch.randn(2, 8))
    assert len(groups) == 0
    assert list(groups.unknown) == ["fft_fft in the model's own forward"]
    assert "fft_fft" in repr(groups)


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason() -> None:
    model = Net(lambda m, x: m.a(x) if float(x.sum()) > 0 else m.b(x), a=nn.Linear(8, 6), b=nn.Linear(8, 6))
    with pytest.raises(ValueError, match=r"torch\.export could not trace Net.*\n?.*"):
        channel_groups(model, torch.randn(2, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            (chain(), IMAGE, "outer"), ValueError, "scope: expected one of 'inner', 'all'", id="scope"
        ),
        pytest.param((IMAGE, IMAGE), TypeError, "channel_groups: model: expected an nn.Module", id="model"),
        pytest.param((chain(), 3), TypeError, "example_inputs", id="inputs"),
        pytest.param(
            (torch.compile(chain()), IMAGE), ValueError, "wrapped in OptimizedModule", id="compiled"
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        channel_groups(*arguments)


def test_groups_of_a_model_that_was_cut_since_refuse() -> None:
    model = Residual().eval()
    groups = channel_groups(model, IMAGE)
    with torch.no_grad():
        model.blocks[0].conv1.weight[:3] = 0
        model.blocks[0].bn1.bias[:3] = 0
        model.blocks[0].bn1.weight[:3] = 0
    compact(model, IMAGE, inplace=True, measure=False)
    with pytest.raises(ValueError, match="make them again"):
        groups.energies()


def test_it_needs_no_other_import_first() -> None:
    code = (
        "from ffr_ext.pruning import channel_groups; import torch; "
        "m = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)); "
        "assert len(channel_groups(m, torch.randn(1, 4))) == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
