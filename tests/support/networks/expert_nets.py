"""Mixtures of experts with dead hidden units: experts that are modules, and experts that are one tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN, EXPERTS = 6, 8, 4


def same_outputs(small: nn.Module, model: nn.Module, shape: tuple[int, ...] = (3, 5, WIDTH)) -> None:
    """Also on other tokens, which go to other experts; one expert may get none."""
    for scale in (1.0, 5.0):
        x = scale * torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)


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
