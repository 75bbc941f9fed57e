"""Experts whose weights are one tensor [experts, ..]: each loses its own hidden units, and all keep as many."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from expert_nets import EXPERTS, HIDDEN, WIDTH, Stacked, same_outputs, stacked
from torch import Tensor, nn

from ffr_ext import CompactionPlan, compact
from ffr_ext.pruning import channel_groups


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


def test_channel_groups_of_a_mixture_are_those_of_its_tensors() -> None:
    """Groups speak of the model's own tensors; stacked experts have none of their own."""
    groups = channel_groups(stacked("weights first"), torch.randn(2, 7, WIDTH))
    assert not any("[" in axis.name for axis in groups.axes)
