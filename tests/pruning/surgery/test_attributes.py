"""Numbers that the user's own modules keep: they follow what is cut, or the report names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import kill
from torch import Tensor, nn

from ffr_ext import CompactionPlan, compact

IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 12)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def identity_kernel(self) -> list[Tensor]:
        kernel = torch.zeros_like(self.conv.weight)
        per_group = self.conv.in_channels // self.groups
        return [kernel[i, i % per_group] for i in range(self.conv.in_channels)]


class Net(nn.Module):
    def __init__(self, **numbers: int) -> None:
        super().__init__()
        self.num_features = 16
        self.stem, self.block, self.head = nn.Conv2d(3, 16, 1), Block(16), nn.Linear(16, 4)
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def dead_net(**numbers: int) -> Net:
    torch.manual_seed(0)
    model = Net(**numbers).eval()
    with torch.no_grad():
        model.block.norm.weight[:9] = 0
    return model


def test_code_that_uses_the_numbers_goes_on_working() -> None:
    result = compact(dead_net(), torch.randn(IMAGE), measure=False)
    assert (result.model.num_features, result.model.block.groups) == (7, 7)
    assert len(result.model.block.identity_kernel()) == 7
    result.model.head = nn.Linear(result.model.num_features, 2)
    assert result.model(torch.randn(IMAGE)).shape == (2, 2)
    assert result.report.notes == []


def test_the_numbers_are_in_the_plan() -> None:
    plan = compact(dead_net(), torch.randn(IMAGE), measure=False).plan
    assert plan.attributes["block"] == {"groups": 7}
    assert plan.attributes[""] == {"num_features": 7}


def test_a_number_that_is_two_sizes_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 16
            self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()).relu())

    torch.manual_seed(0)
    model = Two().eval()
    kill(model.a, [0, 1])
    kill(model.b, [0, 1, 2])
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert result.model.width == 16
    assert any("width=16" in note for note in result.report.notes)


@pytest.mark.parametrize("name", ["kernel_size", "num_classes", "depth", "image_size", "padding"])
def test_numbers_of_something_else_stay(name: str) -> None:
    result = compact(dead_net(**{name: 16}), torch.randn(IMAGE), measure=False)
    assert getattr(result.model, name) == 16
    assert result.report.notes == []


def test_a_number_that_the_forward_uses_for_something_else_does_not_follow() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    torch.manual_seed(0)
    model = Scaled(factor=16).eval()
    with torch.no_grad():
        model.block.norm.weight[:9] = 0
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert (result.model.factor, result.model.block.groups) == (16, 7)
    assert any("factor=16" in note for note in result.report.notes)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(result.model(x), model(x))


def test_sizes_of_a_layer_derived_from_one_of_torchs_are_those_of_its_weight() -> None:
    class Own(nn.Conv2d):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(Own(3, 16, 3), nn.ReLU(), Own(16, 16, 3), nn.ReLU(), Own(16, 16, 3)).eval()
    kill(model[0], [0, 1])
    kill(model[2], [0, 1, 2])
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert [(m.in_channels, m.out_channels) for m in result.model[::2]] == [(3, 14), (14, 13), (13, 16)]
    assert result.report.notes == []


# ---------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------


class Splits(nn.Module):
    """Parts of one tensor that go different ways, as in cross-stage nets and mixed kernels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind != "written":
            self.sizes, self.c, self.d = [10, 6], 10, 6
        self.a = nn.Conv2d(3, 16, 3)
        self.n = nn.BatchNorm2d(16)
        self.p, self.q = nn.Conv2d(10, 4, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.a(x)).relu()
        if self.kind == "list":
            a, b = x.split(self.sizes, 1)
        elif self.kind == "numbers":
            a, b = x.split((self.c, self.d), 1)
        else:
            a, b = torch.split(x, [10, 6], 1)
        return self.p(a) + self.q(b)


def dead_split(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Splits(kind).eval()
    with torch.no_grad():
        model.n.weight[[0, 1, 2, 11]] = 0
        model.n.bias[[0, 1, 2, 11]] = 0
    return model


@pytest.mark.parametrize("kind", ["list", "numbers"])
def test_unequal_parts_follow_where_the_module_keeps_their_sizes(kind: str) -> None:
    model = dead_split(kind)
    result = compact(model, torch.randn(IMAGE), measure=False)
    small = result.model
    assert (small.p.in_channels, small.q.in_channels) == (7, 5)
    assert (small.sizes, small.c, small.d) == ([7, 5], 7, 5)
    assert isinstance(small.sizes, list)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert compact(small, x, measure=False).plan.is_empty


def test_sizes_in_the_forward_code_stay() -> None:
    result = compact(dead_split("written"), torch.randn(IMAGE), measure=False)
    assert result.model.a.out_channels == 16
    assert "split into unequal parts" in result.report.explain()


def test_the_sizes_of_a_split_go_through_the_plan(tmp_path: Any) -> None:
    model = dead_split("list")
    result = compact(model, torch.randn(IMAGE), measure=False)
    result.plan.save(tmp_path / "plan.json")
    fresh = CompactionPlan.load(tmp_path / "plan.json").apply(Splits("list").eval())
    fresh.load_state_dict(result.model.state_dict())
    x = torch.randn(IMAGE)
    assert torch.equal(fresh(x), result.model(x))


class CrossStage(nn.Module):
    """As YOLO's C2f: half of the channels go through blocks, each of whose results is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(24, 4, 1)
        self.norm, self.block = nn.BatchNorm2d(16), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.norm(self.first(x)).relu().split((self.c, self.c), 1))
        parts.append(self.block(parts[-1]))
        return self.last(torch.cat(parts, 1))


def test_equal_parts_follow_one_number() -> None:
    torch.manual_seed(0)
    model = CrossStage().eval()
    with torch.no_grad():
        model.norm.weight[[0, 1, 9, 10, 11]] = 0
        model.norm.bias[[0, 1, 9, 10, 11]] = 0
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert (result.model.first.out_channels, result.model.c) == (12, 6)
    x = torch.randn(IMAGE)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Six heads of two features; with grouped queries three heads of keys and values."""

    def __init__(self, kind: str, key_heads: int = 6) -> None:
        super().__init__()
        self.kind, self.num_heads, self.key_heads, self.head_dim = kind, 6, key_heads, 2
        self.q, self.o = nn.Linear(12, 12), nn.Linear(12, 12)
        self.k, self.v = (nn.Linear(12, key_heads * 2) for _ in "kv")

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        q = self.q(x).view(batch, steps, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (
            f(x).view(batch, steps, self.key_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v)
        )
        times = self.num_heads // self.key_heads
        if self.kind == "expand":
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for t in (k, v))
        elif self.kind == "repeat":
            k, v = (t.repeat_interleave(times, 1) for t in (k, v))
        if self.kind == "written":
            weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kind == "gqa")
        return self.o(y.transpose(1, 2).reshape(batch, steps, -1))


@pytest.mark.parametrize(
    ("kind", "key_heads"), [("fused", 6), ("written", 6), ("repeat", 3), ("expand", 3), ("gqa", 3)]
)
@pytest.mark.parametrize("dead", ["values", "unread", "constant"])
def test_a_dead_head_leaves_as_a_whole(kind: str, key_heads: int, dead: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(kind, key_heads)).eval()
    attention = model[0]
    values = slice(0, 2)  # of the first head of values
    queries = slice(0, 2 * 6 // key_heads)  # those of its queries
    with torch.no_grad():
        if dead == "unread":
            attention.o.weight[:, queries] = 0
        else:
            attention.v.weight[values] = 0
            attention.v.bias[values] = 0.5 if dead == "constant" else 0
    result = compact(model, torch.randn(TOKENS), measure=False)
    small = result.model[0]
    assert small.num_heads == 6 - 6 // key_heads, result.report.explain()
    assert small.q.out_features == small.o.in_features == 2 * small.num_heads
    assert small.v.out_features == small.k.out_features == 2 * (key_heads - 1)
    if key_heads != 6:
        assert small.key_heads == key_heads - 1
    assert small.head_dim == 2
    x = torch.randn(TOKENS)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)


def test_half_a_head_and_half_a_group_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention("gqa", 3)).eval()
    with torch.no_grad():
        model[0].o.weight[:, :2] = 0  # one query of a group of two
        model[0].v.weight[2:3] = 0
        model[0].v.bias[2:3] = 0
    result = compact(model, torch.randn(TOKENS), measure=False)
    assert (result.model[0].num_heads, result.model[0].key_heads) == (6, 3)
    assert result.report.notes == []


def test_heads_that_the_forward_code_counts_stay() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 6, 2).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.o(y.transpose(1, 2).reshape(x.shape))

    torch.manual_seed(0)
    model = Written().eval()
    with torch.no_grad():
        model.o.weight[:, :2] = 0
    result = compact(model, torch.randn(TOKENS), measure=False)
    assert result.model.qkv.out_features == 36
    torch.testing.assert_close(result.model(torch.ones(TOKENS)), model(torch.ones(TOKENS)))
