"""Mixtures of experts: the dead hidden units of each expert leave exactly, and the experts stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffr_ext import CompactionPlan, compact
from ffr_ext.pruning import channel_groups, prune_to

WIDTH, HIDDEN, EXPERTS = 6, 8, 4


def same_outputs(small: nn.Module, model: nn.Module, shape: tuple[int, ...] = (3, 5, WIDTH)) -> None:
    """Also on other tokens, which go to other experts; one expert may get none."""
    for scale in (1.0, 5.0):
        x = scale * torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Experts that are modules
# ------------------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self, dead: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        with torch.no_grad():
            self.up.weight[:dead] = 0
            self.up.bias[:dead] = 0.3 * (dead % 2)  # zeros in one, in the next constants for the bias behind

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """Expert i has i dead hidden units. `kind` names how tokens get to them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate = kind, nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert(i) for i in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = self.gate(tokens).softmax(-1)
        return getattr(self, self.kind)(tokens, scores, *scores.topk(2, -1)).reshape(x.shape)

    def all_weighted(self, x: Tensor, scores: Tensor, *_: Tensor) -> Tensor:
        return sum(scores[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))

    def all_stacked(self, x: Tensor, scores: Tensor, *_: Tensor) -> Tensor:
        return (torch.stack([e(x) for e in self.experts], 1) * scores.unsqueeze(-1)).sum(1)

    def all_masked(self, x: Tensor, _: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            out = out + e(x) * (weight * (chosen == i)).sum(-1, keepdim=True)
        return out

    def all_scattered(self, x: Tensor, scores: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        gate = torch.zeros_like(scores).scatter(1, chosen, weight)
        return sum(gate[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))

    def routed_in_place(self, x: Tensor, _: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            out.index_add_(0, token, e(x[token]) * weight[token, place, None])
        return out

    def routed_unless_empty(self, x: Tensor, _: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, e(x[token]) * weight[token, place, None])
        return out

    def routed_by_numbers(self, x: Tensor, _: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            token = (chosen == i).any(-1).nonzero().squeeze(-1)
            share = (weight * (chosen == i)).sum(-1)
            out = out.index_add(0, token, e(x.index_select(0, token)) * share[token].unsqueeze(-1))
        return out

    def routed_by_masks(self, x: Tensor, _: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            mask = (chosen == i).any(-1)
            out[mask] += e(x[mask]) * (weight * (chosen == i)).sum(-1)[mask].unsqueeze(-1)
        return out

    def routed_into_places(self, x: Tensor, _: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        parts = x.new_zeros(*chosen.shape, WIDTH)
        for i, e in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            parts[token, place] = e(x[token])
        return (parts * weight.unsqueeze(-1)).sum(1)


KINDS = [name for name in vars(Mixture) if name.startswith(("all_", "routed_"))]


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixture(kind)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_dead_hidden_units_of_every_expert_leave(kind: str) -> None:
    model = mixture(kind)
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert [e.up.out_features for e in result.model[1].experts] == [8, 7, 6, 5], result.report.explain()
    assert [e.down.in_features for e in result.model[1].experts] == [8, 7, 6, 5]
    same_outputs(result.model, model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_that_chosen_experts_stay(kind: str) -> None:
    report = compact(mixture(kind), torch.randn(2, 7, WIDTH), measure=False).report
    lines = [note for note in report.notes if "experts" in note]
    said = "1.experts: all experts stay, because which tokens an expert gets depends on values; their dead hidden"
    assert (len(lines) == 1 and lines[0].startswith(said)) == kind.startswith("routed")
    assert any("at least one" in note for note in report.notes) == (kind == "routed_unless_empty")


def test_a_channel_of_the_stream_leaves_with_all_experts() -> None:
    """Nothing in front of, in, or behind the mixture makes or reads it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixture("routed_in_place"), nn.Linear(WIDTH, 3)).eval()
    with torch.no_grad():
        model[0].weight[:2] = model[0].bias[:2] = 0
        for expert in model[1].experts:
            expert.down.weight[:2] = expert.down.bias[:2] = 0
    # The forward names the width in a reshape, which the search finds out.
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert {e.up.in_features for e in result.model[1].experts} == {WIDTH}
    assert any("stay: without their dead channels the forward code fails" in n for n in result.report.notes)
    same_outputs(result.model, model)


class RowsBack(nn.Module):
    """Rows taken, changed and put back, in a net without a fixed width."""

    def __init__(self, put: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.put = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), put
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight[:3] = 0
                layer.bias[:3] = torch.tensor([0.0, 0.5, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(self.put(h, self.b, x.sum(-1) > 0))


def masked(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    out = h.clone()
    out[mask] = layer(h[mask]).relu()
    return out


def copied(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    (rows,) = torch.where(mask)
    return h.index_copy(0, rows, layer(h[rows]).relu())


def added(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    (rows,) = torch.where(mask)
    return h.index_add(0, rows, layer(h[rows]).relu())


def zeroed(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    out = layer(h).relu()
    out[mask] = 0.0
    return out


@pytest.mark.parametrize(
    ("put", "left"),
    [
        (masked, 5),  # 0, and the constants that are the same in both go into the bias behind
        (copied, 5),
        (added, 7),  # rows that something is added to are 0.5 more than the others
        (zeroed, 7),
    ],
)
def test_rows_put_back_keep_a_constant_only_where_it_is_the_same(put: Any, left: int) -> None:
    torch.manual_seed(0)
    model = RowsBack(put).eval()
    small = compact(model, torch.randn(9, 4), measure=False).model
    assert small.b.out_features == small.c.in_features == left
    same_outputs(small, model, (20, 4))


def test_a_choice_among_channels_keeps_them() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            with torch.no_grad():
                self.a.weight[:3] = self.a.bias[:3] = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h.topk(2, -1)[0] + h.argmax(-1, keepdim=True) + h.sort(-1)[0][:, :2] + h.argsort(-1)[:, :2]

    report = compact(Choosing().eval(), torch.randn(3, 4), measure=False).report
    assert report.channels == (8, 8)
    assert "chosen from by topk" in report.explain()
    assert not report.unknown_ops


# ------------------------------------------------------------------------------------------------------------
# Experts whose weights are one tensor
# ------------------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Every expert's hidden units 0..dead - 1 are dead, those of expert i moved on by i."""

    def __init__(self, kind: str, dead: int = 3, constant: float = 0.0, outputs_first: bool = True) -> None:
        super().__init__()
        self.kind, self.outputs_first, self.hidden_size = kind, outputs_first, HIDDEN
        self.gate = nn.Linear(WIDTH, EXPERTS)
        up, down = torch.randn(EXPERTS, HIDDEN, WIDTH), torch.randn(EXPERTS, WIDTH, HIDDEN)
        bias = torch.randn(EXPERTS, HIDDEN)
        for i in range(EXPERTS):
            up[i, i : i + dead] = 0
            bias[i, i : i + dead] = constant
        if not outputs_first:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        self.up_bias, self.down_bias = nn.Parameter(bias), nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(tokens).softmax(-1).topk(2, -1)
        ids, rows = chosen.reshape(-1), tokens.repeat_interleave(2, 0)
        h = F.gelu(self.product(rows, self.up, ids) + self.up_bias[ids])
        y = self.product(h, self.down, ids) + self.down_bias[ids]
        return (y * weight.reshape(-1, 1)).view(*chosen.shape, -1).sum(1).reshape(x.shape)

    def product(self, x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        taken = weight[ids]
        if self.kind == "rows first":
            return torch.bmm(x.unsqueeze(1), taken.transpose(1, 2) if self.outputs_first else taken).squeeze(
                1
            )
        return torch.bmm(taken if self.outputs_first else taken.transpose(1, 2), x.unsqueeze(-1)).squeeze(-1)


def stacked(*args: Any, **kw: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Stacked(*args, **kw)).eval()


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("kind", ["rows first", "weights first"])
def test_each_expert_loses_its_own_units(kind: str, outputs_first: bool) -> None:
    model = stacked(kind, outputs_first=outputs_first)
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    small = result.model[1]
    shape = (EXPERTS, 5, WIDTH) if outputs_first else (EXPERTS, WIDTH, 5)
    assert small.up.shape == shape, result.report.explain()
    assert small.up_bias.shape == (EXPERTS, 5)
    assert small.down_bias.shape == (EXPERTS, WIDTH)
    assert small.hidden_size == 5, "a number that the module keeps follows"
    for i in range(EXPERTS):
        kept = [j for j in range(HIDDEN) if not i <= j < i + 3]
        assert torch.equal(small.up_bias[i], model[1].up_bias[i, kept])
    assert any("1: all experts stay" in note for note in result.report.notes)
    same_outputs(result.model, model)


def test_constant_units_of_an_expert_are_carried_by_one_of_them() -> None:
    model = stacked("weights first", constant=0.7)
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert result.model[1].up.shape[1] == HIDDEN - 2
    assert result.report.merged == 2 * EXPERTS
    same_outputs(result.model, model)


def test_experts_keep_as_many_units_as_the_one_with_most() -> None:
    model = stacked("weights first")
    with torch.no_grad():
        model[1].up[2, 4:7] = 0
        model[1].up_bias[2, 4:7] = 0
        model[1].up[1, 1:2] = 1.0
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert result.model[1].up.shape[1] == 6
    assert "the tensor of all experts" in result.report.explain()
    same_outputs(result.model, model)


@pytest.mark.parametrize("seed", range(8))
def test_random_units_of_stacked_experts(seed: int) -> None:
    """Zeros leave, and of an expert's constants all but one; the expert that keeps most decides for all."""
    model = stacked("weights first", dead=0)
    torch.manual_seed(seed)
    dead = torch.rand(EXPERTS, HIDDEN) < 0.6
    constant = dead & (torch.rand(EXPERTS, HIDDEN) < 0.3)
    with torch.no_grad():
        model[1].up[dead] = 0
        model[1].up_bias[dead] = 0
        model[1].up_bias[constant] = torch.rand(int(constant.sum())) + 0.5
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    left = int(((~dead).sum(1) + constant.any(1)).clamp(min=1).max())
    assert result.model[1].up.shape[1] == left, result.report.explain()
    same_outputs(result.model, model)
    assert compact(result.model, torch.randn(2, 7, WIDTH), measure=False).plan.is_empty


def test_the_plan_of_stacked_experts_comes_back_from_its_file(tmp_path: Path) -> None:
    model = stacked("rows first", constant=0.7)
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    result.plan.save(tmp_path / "plan.json")
    again = CompactionPlan.load(tmp_path / "plan.json").apply(copy.deepcopy(model))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    twice = compact(result.model, torch.randn(2, 7, WIDTH), measure=False)
    assert twice.plan.is_empty


def test_the_optimizer_goes_on_with_stacked_experts() -> None:
    """The next step is the one the masked model makes: its dead units get no gradient behind a relu of zeros."""
    model = stacked("weights first").train()
    masked_model = copy.deepcopy(model)
    x = torch.randn(2, 7, WIDTH)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, masked_model)]

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        with torch.no_grad():  # what is dead stays so
            for i in range(EXPERTS) if net[1].up.shape[1] == HIDDEN else ():
                net[1].up.grad[i, i : i + 3] = net[1].up_bias.grad[i, i : i + 3] = 0
        optimizer.step()

    for net, optimizer in zip((model, masked_model), optimizers, strict=True):
        step(net, optimizer)
    result = compact(model, x, optimizer=optimizers[0], measure=False)
    for net, optimizer in zip((result.model, masked_model), optimizers, strict=True):
        step(net, optimizer)
    same_outputs(result.model, masked_model)
    assert result.model[1].up.shape[1] == 5


def test_weights_that_something_else_reads_stay() -> None:
    class Penalised(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.up.square().sum()

    torch.manual_seed(0)
    model = Penalised("weights first").eval()
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert result.model.up.shape == model.up.shape
    same_outputs(result.model, model)


def test_hidden_units_that_the_forward_looks_at_stay_together() -> None:
    """What all experts compute is read as one tensor as well: a unit leaves where it is dead in all."""

    class Watched(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            ids = self.gate(tokens).argmax(-1)
            h = F.relu(self.product(tokens, self.up, ids))
            return self.product(h, self.down, ids).reshape(x.shape) + h.sum()

    torch.manual_seed(0)
    model = Watched("weights first", dead=5).eval()  # 0..4, 1..5, 2..6, 3..7: all have 3 and 4
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert result.model.up.shape[1] == HIDDEN - 2, result.report.explain()
    same_outputs(result.model, model)


def test_hidden_units_stay_together_where_rows_of_all_experts_are_mixed() -> None:
    """A unit of zeros in one expert is none behind a mean over all tokens."""

    class Centred(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            ids = self.gate(tokens).argmax(-1)
            h = F.relu(self.product(tokens, self.up, ids))
            return self.product(h - h.mean(0), self.down, ids).reshape(x.shape)

    torch.manual_seed(0)
    model = Centred("weights first", dead=5).eval()
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert result.model.up.shape[1] == HIDDEN - 2, result.report.explain()
    assert result.report.notes[:-1] == [], "found from the graph, not by trying"
    same_outputs(result.model, model)


def test_parts_of_a_stack_lose_what_is_dead_in_all() -> None:
    """Rows chosen by values times stack[i]: all experts have one hidden size, and the same units."""

    class Parts(Stacked):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            chosen, out = self.gate(tokens).argmax(-1), torch.zeros_like(tokens)
            for i in range(EXPERTS):
                (rows,) = torch.where(chosen == i)
                h = F.relu(F.linear(tokens[rows], self.up[i]))
                out = out.index_add(0, rows, F.linear(h, self.down[i]))
            return out.reshape(x.shape)

    torch.manual_seed(0)
    model = Parts("weights first", dead=5).eval()
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert result.model.up.shape[1] == HIDDEN - 2, result.report.explain()
    assert any(note.startswith("the model: all experts stay") for note in result.report.notes)
    same_outputs(result.model, model)


def test_experts_in_one_einsum_lose_what_is_dead_in_all() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, EXPERTS)
            self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))
            self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
            with torch.no_grad():
                for i in range(EXPERTS):
                    self.up[i, :, i : i + 5] = 0

        def forward(self, x: Tensor) -> Tensor:
            h = torch.einsum("bh,ehi->bei", x, self.up).relu()
            y = torch.einsum("bei,eih->beh", h, self.down)
            return (y * self.gate(x).softmax(-1).unsqueeze(-1)).sum(1)

    torch.manual_seed(0)
    model = Dense().eval()
    result = compact(model, torch.randn(5, WIDTH), measure=False)
    assert result.model.up.shape == (EXPERTS, WIDTH, HIDDEN - 2), result.report.explain()
    same_outputs(result.model, model, (9, WIDTH))


def test_a_budget_of_parameters_is_met_and_one_of_flops_refused_where_values_decide() -> None:
    x = torch.randn(2, 7, WIDTH)
    small = prune_to(mixture("routed_in_place"), x, parameters=0.7)
    assert small.report.parameters[1] <= 0.7 * small.report.parameters[0]
    with pytest.raises(
        ValueError, match=r"flops: 1\.experts take as many tokens as values send them.*parameters="
    ):
        prune_to(mixture("routed_in_place"), x, flops=0.7)
    small = prune_to(mixture("all_masked"), x, flops=0.7)
    assert small.report.flops[1] <= 0.7 * small.report.flops[0]


def test_channel_groups_of_a_mixture_are_those_of_its_tensors() -> None:
    """Groups speak of the model's own tensors; stacked experts have none of their own."""
    groups = channel_groups(stacked("weights first"), torch.randn(2, 7, WIDTH))
    assert not any("[" in axis.name for axis in groups.axes)
