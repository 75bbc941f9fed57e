"""The penalty that group regularizers share: weighted norms of groups of slices, by gradient or by proximal map."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..checks import check_choice
from ..pruning.graph.groups.shards import Local, local_parts, max_over_ranks
from ..pruning.graph.groups.slices import Slices
from ..pruning.norms import filter_norms
from .base import BaseRegularizer, finite
from .fused import add_scaled_, row_column_norms, shrink_
from .prox import non_negative
from .step_size import Step, last_steps, overflows, watch

FORMS = ("gradient", "prox")

# A factor for float32 weights; one that is larger belongs to a norm that is all but 0, and the product stays finite.
_LARGEST = torch.finfo(torch.float32).max


class GroupPenalty(BaseRegularizer):
    """``scale * weight * sum_g strength_g ||W_g||_2`` over groups g of slices.

    Where a group is exactly 0 its gradient is 0; a NaN weight makes the gradients of its groups NaN.

    Args:
        model: the module whose tensors `slices` names.
        slices: the groups.
        strengths: of each group, (groups,).
        layers: name of a layer -> the numbers of its groups, for `terms`.
        weight: a finite number of at least 0.
        form: ``"gradient"``: `loss` and `add_gradients_` hold the penalty. ``"prox"``: `step` shrinks the groups after
            the optimizer's step instead, which makes exact zeros.
        step_size: what the thresholds of ``"prox"`` are multiplied by. None: the learning rate of the optimizer that
            stepped the parameters last, divided by 1 - momentum where it has one, so that ``weight`` means the same in
            both forms; nothing is shrunk before one has stepped. Give it where no `torch.optim` optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        slices: Slices,
        strengths: Tensor,
        layers: Mapping[str, Tensor],
        *,
        weight: float,
        form: str = "gradient",
        step_size: float | None = None,
    ) -> None:
        super().__init__(model)
        self.weight = non_negative("weight", weight)
        check_choice("form", form, FORMS)
        self.form = form
        self.step_size = None if step_size is None else non_negative("step_size", step_size)
        self._slices = slices
        self._strengths = strengths.double()
        self._layers = dict(layers)
        self._names = list(dict.fromkeys(axis.name for axis in slices.axes))
        self._axes = {(axis.name, axis.dim): axis for axis in slices.axes}
        self._followed: dict[str, int] = {}  # the number of the optimizer's step that `step` followed last
        self._warned = False
        if form == "prox":
            watch()
            self._moves()

    # ---------------------------------------------------------------------------------------------------
    # The protocol
    # ---------------------------------------------------------------------------------------------------

    def loss(self) -> Tensor:
        """The penalty, a 0-dim tensor that can be differentiated once, with the gradient that `add_gradients_` adds.

        With ``form="prox"`` it has only what is left to gradients (nothing, without a sparse penalty): the rest is done
        by `step`.
        """
        tensors = list(self._slices.tensors(self._names).values())
        if not self.active or not self._has_gradient:
            return torch.zeros((), device=tensors[0].device)
        total: Tensor = _Penalty.apply(self, *tensors)
        return total

    @torch.no_grad()
    def add_gradients_(self) -> None:
        """Add the gradient of `loss` to the parameters' ``.grad``, in one launch for all. See the base class."""
        if not self.active or not self._has_gradient:
            return
        tensors = self._slices.tensors(self._names)
        trained = [name for name in self._names if tensors[name].requires_grad]
        factors = self._gradient_factors()
        fresh = [tensors[name] for name in trained if tensors[name].grad is None]
        for tensor in fresh:
            tensor.grad = torch.zeros_like(tensor)
        try:
            grads = local_parts(_existing(tensors[name].grad) for name in trained)
            self._add(trained, [g.tensor for g in grads], factors, self.scale)
        except (
            TypeError,
            ValueError,
        ):  # a gradient of another dtype or layout: refused before anything is added
            for tensor in fresh:
                tensor.grad = None
            raise

    @torch.no_grad()
    def step(self) -> None:
        """With ``form="prox"``: shrink every group by its threshold, to exact zeros where that is its norm or more.

        A weight that is in two groups (the filter of one channel and what another is read by) is multiplied by the
        factors of both. What its optimizer has not moved since the last call stays: a ``GradScaler`` leaves steps out,
        those of fused optimizers too. Before the first step of any optimizer that can be seen from gradients that are
        not finite alone, so call this before gradients are zeroed.
        """
        if not self.active or self.form != "prox":
            return
        moves = self._moves() or self._moved_by_hand()
        if not moves:
            return
        norms = self.norms()
        shares = self.scale * self.weight * self._strengths.to(norms.device) / norms
        shares = torch.where(norms == 0, 0.0, shares)
        names = list(moves)
        parts = self._slices.local(names)
        keeps = {(step.size, step.number): _keep(shares, step) for step in moves.values()}
        vectors = [keeps[step.size, step.number] for step in moves.values()]
        rows, columns = self._lay_out(names, parts, vectors, 1.0)
        shrink_([part.tensor for part in parts], rows, columns)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters with a slice in some group that can be trained."""
        tensors = self._slices.tensors(self._names).values()
        return [t for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad]

    @torch.no_grad()
    def terms(self) -> dict[str, Tensor]:
        """``weight * sum strength ||W_g||`` of each layer, detached, without ``scale``."""
        values = self._values()
        return {name: values[groups.to(values.device)].sum() for name, groups in self._layers.items()}

    def norms(self) -> Tensor:
        """||W_g|| of every group, in float64."""
        parts = dict(zip(self._names, self._slices.local(self._names), strict=True))
        norms = self._norms_of_slices(parts)
        of_axes = [parts[name] for name, _ in self._axes]
        return self._slices.sums_of_squares(
            list(self._axes.values()), of_axes, [norms[key] for key in self._axes]
        ).sqrt()

    # ---------------------------------------------------------------------------------------------------
    # What subclasses add for single weights
    # ---------------------------------------------------------------------------------------------------

    @property
    def _has_gradient(self) -> bool:
        return self.form == "gradient"

    def _thresholds(self, names: Sequence[str]) -> tuple[list[float], list[float]]:
        """Slope and threshold of a capped ridge on each tensor."""
        return [0.0] * len(names), [0.0] * len(names)

    def _add_of_single_weights(self, names: Sequence[str], grads: Sequence[Tensor], scale: float) -> None:
        """Gradients of single weights that are no capped ridge."""

    def _value_of_single_weights(self) -> Tensor | float:
        return 0.0

    # ---------------------------------------------------------------------------------------------------

    def _norms_of_slices(self, parts: Mapping[str, Local]) -> dict[tuple[str, int], Tensor]:
        """Norms of the slices of each axis; a tensor with rows and columns is read once."""
        both = [n for n in self._names if (n, 0) in self._axes and (n, 1) in self._axes]
        single = [key for key in self._axes if key[0] not in set(both)]
        found: dict[tuple[str, int], Tensor] = {}
        for name, pair in zip(both, row_column_norms([parts[n].tensor for n in both]), strict=True):
            found.update({(name, dim): norm for dim, norm in enumerate(pair) if norm is not None})
        norms = filter_norms([parts[name].tensor for name, _ in single], 2, [dim for _, dim in single])
        found.update(zip(single, norms, strict=True))
        return found

    def _gradient_factors(self) -> Tensor | None:
        """weight * strength / ||W_g|| of each group, 0 where the norm is: what a weight of it is multiplied by. None
        where that is left to `step`."""
        if self.form == "prox":
            return None
        norms = self.norms()
        factors = (self.weight * self._strengths.to(norms.device) / norms).clamp(max=_LARGEST)
        return torch.where(norms == 0, 0.0, factors)

    def _add(
        self, names: Sequence[str], grads: Sequence[Tensor], factors: Tensor | None, scale: float
    ) -> None:
        parts = self._slices.local(names)
        vectors = [] if factors is None else [scale * factors] * len(names)
        rows, columns = self._lay_out(names, parts, vectors, 0.0)
        slopes, taus = self._thresholds(names)
        add_scaled_(
            grads, [p.tensor for p in parts], rows, columns, [scale * slope for slope in slopes], taus
        )
        self._add_of_single_weights(names, grads, scale)

    def _lay_out(
        self, names: Sequence[str], parts: Sequence[Local], vectors: Sequence[Tensor], outside: float
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """For each tensor its vector over the groups, along its rows and along its columns; None without vectors."""
        found: tuple[list[Tensor | None], list[Tensor | None]] = ([None] * len(names), [None] * len(names))
        for vector in {id(v): v for v in vectors}.values():
            wanted = [
                (i, dim)
                for i, name in enumerate(names)
                for dim in (0, 1)
                if vectors[i] is vector and (name, dim) in self._axes
            ]
            axes = [self._axes[names[i], dim] for i, dim in wanted]
            laid = self._slices.spread(axes, [parts[i] for i, _ in wanted], vector, outside)
            for (i, dim), entries in zip(wanted, laid, strict=True):
                found[dim][i] = entries
        return found

    def _values(self) -> Tensor:
        """weight * strength * ||W_g|| of each group."""
        norms = self.norms()
        return self.weight * self._strengths.to(norms.device) * norms

    def _value(self) -> Tensor:
        values = self._values()
        return values.sum() * (self.form == "gradient") + self._value_of_single_weights()

    def _moves(self) -> dict[str, Step]:
        """The parameters that an optimizer has moved since the last call, and how far it goes."""
        tensors = self._slices.tensors(self._names)
        trained = [name for name in self._names if tensors[name].requires_grad]
        last = dict(zip(trained, last_steps([tensors[name] for name in trained]), strict=True))
        known = {name: step for name, step in last.items() if step is not None}
        fresh = {name: step for name, step in known.items() if self._followed.get(name) != step.number}
        self._followed.update((name, step.number) for name, step in fresh.items())
        if self.step_size is None:
            return fresh
        return {name: step._replace(size=self.step_size) for name, step in fresh.items()}

    def _moved_by_hand(self) -> dict[str, Step]:
        """The same where no optimizer has ever stepped: all by the given `step_size`, and none where gradients say
        that a GradScaler left the first step out."""
        tensors = self._slices.tensors(self._names)
        trained = [name for name in self._names if tensors[name].requires_grad]
        worst = overflows([p for p in self.model.parameters() if p.requires_grad])
        if self._followed or not trained or bool(max_over_ranks(worst, self._slices.local(trained))):
            return {}
        if self.step_size is not None:
            return dict.fromkeys(trained, Step(self.step_size))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}.step() shrinks nothing: no torch.optim optimizer has stepped its parameters. "
                "Call it after optimizer.step(); give step_size= where something else trains them",
                stacklevel=3,
            )
        return {}


def _keep(shares: Tensor, step: Step) -> Tensor:
    """What is left of each group, of 1; NaN stays."""
    kept = (1 - step.size * shares).clamp(min=0)
    return kept if step.left_out is None else torch.where(step.left_out.to(kept.device), 1.0, kept)


class _Penalty(torch.autograd.Function):
    """The penalty as one node: its backward pass is `add_gradients_` into fresh tensors."""

    @staticmethod
    def forward(ctx: Any, penalty: GroupPenalty, *tensors: Tensor) -> Tensor:
        ctx.penalty, ctx.scale = penalty, penalty.scale
        ctx.save_for_backward(*tensors)
        wide = any(t.dtype == torch.float64 for t in tensors)
        return (penalty.scale * penalty._value()).to(torch.float64 if wide else torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # refuses weights that were changed since
        penalty: GroupPenalty = ctx.penalty
        tensors = penalty._slices.tensors(penalty._names)
        grads = [torch.zeros_like(t, requires_grad=False) for t in tensors.values()]
        parts = [part.tensor for part in local_parts(grads)]
        penalty._add(penalty._names, parts, penalty._gradient_factors(), ctx.scale)
        for part in parts:
            part.mul_(upstream.to(part.device))
        return (None, *grads)


def _existing(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def check_regularizes_something(name: str, count: int, hint: str) -> None:
    """ValueError for a penalty without a group: one that is silently zero would train nothing."""
    if count == 0:
        raise ValueError(f"model: {name} finds nothing to regularise: {hint}")


def check_positive(name: str, value: Any) -> float:
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return number
