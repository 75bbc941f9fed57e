"""What the forward code needs is found in few runs, and nothing else stays for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import Net, conv, linear
from torch import Tensor, nn

from ffr_ext import compact
from ffr_ext.pruning.surgery import search
from ffr_ext.pruning.surgery.rehearsal import Rehearsal

X = (2, 3, 8, 8)


class StoredSplit(nn.Module):
    """Parts of sizes that are stored where they cannot follow, in a configuration: they need all their channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(sizes=[c // 2, c // 2])
        self.expand, self.norm, self.merge = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)
        self.parts = nn.ModuleList(
            nn.Conv2d(c // 2, c // 2, k, padding=k // 2, groups=c // 2) for k in (3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(self.expand(x)).relu().split(self.config.sizes, 1)
        return x + self.merge(torch.cat([layer(p) for layer, p in zip(self.parts, parts, strict=True)], 1))


class StoredWidth(nn.Module):
    """Parts of a stored width that are added one to the next, as in Res2Net."""

    def __init__(self, c: int) -> None:
        super().__init__()
        width = c // 4
        self.config = SimpleNamespace(width=width)
        self.expand, self.norm, self.merge = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.norm(self.expand(x)).relu().split(self.config.width, 1))
        out = [self.convs[0](parts[0])]
        for layer, part in zip(self.convs[1:], parts[1:], strict=False):
            out.append(layer(out[-1] + part))
        return x + self.merge(torch.cat([*out, parts[-1]], 1))


class StoredView(nn.Module):
    """A stored size in a view."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(c=c)
        self.expand, self.norm, self.merge = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.expand(x)).relu()
        return x + self.merge(out.view(-1, self.config.c, *x.shape[2:]))


class OwnWidth(nn.Module):
    """Another tensor in the shape of what comes in, as in the attention of YOLO: both have to have all channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.expand, self.norm, self.merge = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c, c, 1)
        self.mix = Mixing(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.merge(self.mix(self.norm(self.expand(x)).relu()))


class Mixing(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.value = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x).flatten(2).softmax(1)
        return value.view(x.shape)


class Followed(nn.Module):
    """Parts of sizes that the forward computes: they may shrink."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.expand, self.norm, self.merge = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.Conv2d(c // 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.expand(x)).relu()
        a, b = out.split(out.shape[1] // 2, 1)
        return x + self.merge(a * b)


def stack(*blocks: nn.Module, width: int = 16) -> nn.Module:
    """The blocks one after the other; in each every fourth of the expanded channels is dead."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 1), *blocks, nn.Conv2d(width, 2, 1))
    with torch.no_grad():
        for block in blocks:
            block.norm.weight[::4] = 0
            block.norm.bias[::4] = 0
            for layer in getattr(block, "convs", []):  # added to the next part
                layer.weight[0] = 0
                layer.bias[0] = 0
    return model.eval()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the search exports, cuts a copy, and starts to halve."""
    counts = dict.fromkeys(("trace", "cut", "halves"), 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(search, "trace", counting("trace", search.trace))
    monkeypatch.setattr(search.Search, "_cut", counting("cut", search.Search._cut))
    halves = search.Search._largest_by_halves
    monkeypatch.setattr(search.Search, "_largest_by_halves", counting("halves", halves))
    return counts


@pytest.mark.parametrize("block", [StoredSplit, StoredWidth, StoredView, OwnWidth])
@pytest.mark.parametrize("depth", [1, 12])
def test_stored_sizes_of_any_number_of_blocks_take_as_many_copies(
    block: type[nn.Module], depth: int, counted: dict[str, int]
) -> None:
    """By halving, twelve blocks took more than forty copies."""
    model = stack(*[block(16) for _ in range(depth)], Followed(16))
    result = compact(model, torch.randn(X), measure=False)
    assert result.model[-2].expand.out_channels == 12
    assert all(result.model[i].expand.out_channels == 16 for i in range(1, depth + 1))
    assert len(result.report.notes) == depth
    assert all("without their dead channels the forward code fails" in note for note in result.report.notes)
    assert "the forward code depends on its size" in result.report.explain()
    assert counted["trace"] == 1
    assert counted["cut"] <= 7
    assert counted["halves"] == 0


def test_kinds_of_stored_sizes_are_told_apart_in_one_model(counted: dict[str, int]) -> None:
    blocks = [StoredSplit(16), Followed(16), StoredWidth(16), Followed(16), StoredView(16), Followed(16)]
    model = stack(*blocks)
    result = compact(model, torch.randn(X), measure=False)
    assert [b.expand.out_channels for b in result.model[1:-1]] == [16, 12, 16, 12, 16, 12]
    assert counted["halves"] == 0
    x = torch.randn(X)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_module_that_many_share_does_not_hide_the_place(counted: dict[str, int]) -> None:
    """One activation for the whole model, as in YOLO: its calls are told apart."""
    model = stack(*[StoredSplit(16) for _ in range(3)], Followed(16))
    shared = nn.SiLU()
    for block in model[1:-1]:
        block.norm = nn.Sequential(block.norm, shared)
    result = compact(model, torch.randn(X), measure=False)
    assert [b.expand.out_channels for b in result.model[1:-1]] == [16, 16, 16, 12]
    assert counted["halves"] == 0


@pytest.mark.parametrize("deep", [False, True])
def test_what_only_training_mode_reads_is_found_without_halving(deep: bool, counted: dict[str, int]) -> None:
    """Auxiliary classifiers, as GoogLeNet has two."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 2, 1)) if deep else nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.avg_pool2d(x, 2))

    class Classifying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                conv(3, 8, 1, slice(0, 3)),
                conv(8, 8, 1, slice(0, 3)),
                conv(8, 8, 1, slice(0, 3)),
                conv(8, 2, 1),
            )
            self.first, self.second = Auxiliary(), Auxiliary()

        def forward(self, x: Tensor) -> list[Tensor]:
            a = self.a(x)
            b = self.b(a.relu())
            c = self.c(b.relu())
            out = [self.d(c.relu())]
            return [*out, self.first(a), self.second(c)] if self.training else out

    torch.manual_seed(0)
    model = Classifying().eval()
    result = compact(model, torch.randn(X), measure=False)
    assert [getattr(result.model, n).out_channels for n in "abc"] == [8, 5, 8]
    assert len(result.model.train()(torch.randn(X))) == 3
    assert counted["halves"] == 0


def test_only_the_channels_that_are_needed_stay() -> None:
    """The view is of the second layer's width; the first and the third, in the same forward, shrink."""
    model = Net(
        lambda n, x: n.d(n.c(n.b(n.a(x).relu()).relu().view(-1, 8, 8, 8)).relu()),
        a=conv(3, 8, 1, slice(0, 3)),
        b=conv(8, 8, 1, slice(0, 3)),
        c=conv(8, 8, 1, slice(0, 3)),
        d=conv(8, 2, 1),
    ).eval()
    result = compact(model, torch.randn(X), measure=False)
    assert [getattr(result.model, n).out_channels for n in "abc"] == [5, 8, 5]


def test_a_wrong_value_is_found_although_every_shape_is_right(counted: dict[str, int]) -> None:
    """The forward scales by a stored width: no shape shows it, so the channels are found by halves."""
    model = Net(
        lambda n, x: n.c((n.b(n.a(x)) * (8 / n.b.out_channels)).mean((2, 3))),
        a=conv(3, 8, 1, slice(0, 3)),
        b=conv(8, 8, 1, slice(0, 3)),
        c=linear(8, 2),
    ).eval()
    result = compact(model, torch.randn(X), measure=False)
    assert [result.model.a.out_channels, result.model.b.out_channels] == [5, 8]
    assert counted["halves"] == 1
    assert any("the outputs differ" in note for note in result.report.notes)


def test_a_rehearsal_leaves_a_model_as_it_was() -> None:
    from ffr_ext.pruning.graph.analysis import Analysis
    from ffr_ext.pruning.graph.solver import Options, Solver
    from ffr_ext.pruning.graph.trace import trace

    model, x = stack(StoredSplit(16)), torch.randn(X)
    model[1].forward = model[1].forward  # of its own
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    solver = Solver(Analysis(trace(model, (x,), {}), strict=True), Options())
    rehearsal = Rehearsal(solver, model, (x,), {})
    removed = solver.solve()
    assert bool(removed.any())
    candidate = copy.deepcopy(model)
    assert rehearsal.incidents(candidate, removed), "nothing was cut, so every block gives other shapes"
    assert {path: dict(vars(m)) for path, m in model.named_modules()} == before
    assert [p for p, m in candidate.named_modules() if "forward" in vars(m)] == ["1"]


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_second_round_remembers_what_the_first_found(blocks: int, counted: dict[str, int]) -> None:
    """A branch that the cut leaves zeros of asks for a second round; the stored sizes are not searched again."""
    branch = nn.GroupNorm(2, 16)
    model = stack(*[StoredSplit(16) for _ in range(blocks)], width=16)
    with torch.no_grad():
        branch.weight[8:] = 0
        branch.bias.zero_()
    model.insert(1, branch)
    result = compact(model.eval(), torch.randn(X), measure=False)
    assert counted["cut"] <= 10
    assert compact(result.model, torch.randn(X), measure=False).plan.is_empty
