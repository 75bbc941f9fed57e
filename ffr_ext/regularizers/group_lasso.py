"""`SparseGroupLasso`: whole filters and single weights, by a convex or a nonconvex penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_choice
from ..pruning.graph.groups import channel_groups
from ..pruning.graph.groups.shards import Local, sum_over_ranks
from ..pruning.graph.groups.slices import Axis, Slices
from ..pruning.graph.states import on_cpu
from ..pruning.scale import find_layers
from .oicsr import check_channels, families
from .penalty import GroupPenalty, check_positive, check_regularizes_something
from .prox import SPARSE_KINDS, check_parameters, envelope, non_negative, prox

GROUPS = ("out", "paper", "coupled")

# beta / lambda of the published code for LeNet-5; the threshold of l0 is then sqrt(2 / 25) = 0.28.
_BETA = 25.0


class SparseGroupLasso(GroupPenalty):
    """``scale * ( weight * sum_g sqrt(n_g) ||W_g||_2  +  sum_j e(W_j) )``: whole groups and single weights go to 0.

    Nonconvex sparse group lasso (Bui, Park, Zhang, Qi, Xin; Front. Appl. Math. Stat. 6:529564, 2021), as their
    published code minimises it, n_g the number of weights of a group and ::

        e(w) = min_u  beta (w - u)^2 / 2 + weight r(u)         r = sparse;    e'(w) = beta (w - prox(w))

    For l0 that is the capped ridge ``min(beta w^2 / 2, weight)``: decay of beta below the threshold
    sqrt(2 weight / beta) and none above. The code keeps u as a copy of the weights; since its u is always ``prox(w)``,
    none is needed here, and the gradients are the same to the last bit. (That the split is an envelope is our
    observation.) ::

        lasso = SparseGroupLasso(model, weight=1e-4)
        ...
        loss.backward(); lasso.add_gradients_(); optimizer.step(); lasso.step()

    Args:
        model: any module; with ``groups="coupled"`` one that `channel_groups` can trace, wrapped afterwards.
        weight: lambda / N of the paper, N the number of training samples; a finite number of at least 0.
        sparse: r of single weights: "l0", "l1", "transformed_l1", "scad", "l1_l2" (of a tensor as a whole), see `prox`;
            None for the group lasso alone. Scales of norms have none.
        beta: beta / N of the paper, above 0. None: 25 times ``weight``, the ratio of the published setting for LeNet-5.
        groups: ``"out"``: every filter of every convolution and linear layer. ``"paper"``: filters of convolutions and
            input neurons of linear layers, as the published code. ``"coupled"``: the channels of
            ``channel_groups(model, example_inputs, "all")`` with all their slices: what can leave the model.
        example_inputs: for ``"coupled"``, and to find the norm behind each layer by the graph; see `sparsity`.
        include_norm: the scale of the batch norm behind a filter belongs to its group (ours). Without it nothing drives
            filters in front of a batch norm to 0, since their size changes nothing.
        form: ``"gradient"``, as published. ``"prox"``: `step` shrinks the groups after the optimizer's step, at exact
            zeros; single weights keep the gradient of e. (Both maps one after the other would not be the joint
            proximal map of l0 and the norm.)
        step_size: for ``"prox"``, see `GroupPenalty`: by default the optimizer's learning rate.
        parameters: ``a`` of the transformed l1 and SCAD, ``alpha`` of "l1_l2", see `prox`.

    Attributes:
        beta: as above; `grow` multiplies it, and `state_dict` holds it.

    Raises:
        TypeError, ValueError: an argument is not as above, or the model has nothing to regularise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight: float,
        sparse: str | None = "l0",
        beta: float | None = None,
        groups: str = "out",
        example_inputs: Any = None,
        include_norm: bool = True,
        form: str = "gradient",
        step_size: float | None = None,
        **parameters: float,
    ) -> None:
        non_negative("weight", weight)
        check_choice("groups", groups, GROUPS)
        if sparse is not None:
            check_choice("sparse", sparse, SPARSE_KINDS)
        if not isinstance(include_norm, bool):
            raise TypeError(f"include_norm: expected True or False, got {include_norm!r}")
        self.sparse = sparse
        self._parameters = check_parameters(sparse or "none", parameters)
        self.beta = _BETA * float(weight) if beta is None else check_positive("beta", beta)
        if groups == "coupled":
            if example_inputs is None:
                raise ValueError(
                    "example_inputs: groups='coupled' needs example inputs to trace the model with"
                )
            slices, layers = _coupled(model, example_inputs, include_norm)
        else:
            slices, layers = _by_layer(model, example_inputs, include_norm, inputs=groups == "paper")
        strengths = _sizes(slices).sqrt()
        super().__init__(model, slices, strengths, layers, weight=weight, form=form, step_size=step_size)
        self._weights = {axis.name for axis in slices.axes if axis.role != "scale"}

    def grow(self, factor: float) -> None:
        """Multiply beta by a number above 0, which lowers the threshold: 1.25 every 20 or 40 epochs in the code."""
        self.beta *= check_positive("factor", factor)

    def state_dict(self) -> dict[str, Any]:
        """The scale and beta."""
        return {**super().state_dict(), "beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if not isinstance(state, Mapping) or "beta" not in state:
            raise ValueError(
                f"state: expected what state_dict() returned, with 'scale' and 'beta', got {state!r}"
            )
        beta = non_negative("beta", state["beta"])
        super().load_state_dict(state)
        self.beta = beta

    # ---------------------------------------------------------------------------------------------------

    @property
    def _penalises_weights(self) -> bool:
        return self.sparse is not None and self.beta > 0  # beta is 0 with a weight of 0

    @property
    def _has_gradient(self) -> bool:
        return super()._has_gradient or self._penalises_weights

    def _thresholds(self, names: Sequence[str]) -> tuple[list[float], list[float]]:
        if self.sparse != "l0" or not self._penalises_weights:
            return super()._thresholds(names)
        slopes = [self.beta if name in self._weights else 0.0 for name in names]
        return slopes, [(2 * self.weight / self.beta) ** 0.5] * len(names)

    def _add_of_single_weights(self, names: Sequence[str], grads: Sequence[Tensor], scale: float) -> None:
        if self.sparse == "l0" or not self._penalises_weights:
            return
        for name, grad, part in zip(names, grads, self._slices.local(names), strict=True):
            if name in self._weights:
                wide = part.tensor.to(torch.promote_types(part.tensor.dtype, torch.float32))
                grad.add_(wide - self._prox(name, wide, part), alpha=scale * self.beta)

    def _value_of_single_weights(self) -> Tensor | float:
        if not self._penalises_weights:
            return 0.0
        names = [name for name in self._names if name in self._weights]
        parts = self._slices.local(names)
        values = [self._envelope(name, part) for name, part in zip(names, parts, strict=True)]
        if self.sparse == "l1_l2":  # made of whole tensors, on every rank
            return torch.stack(values).sum()
        return sum_over_ranks(
            torch.stack([v * p.counts for v, p in zip(values, parts, strict=True)]).sum(), parts
        )

    def _envelope(self, name: str, part: Local) -> Tensor:
        tensor = self._whole(name, part) if self.sparse == "l1_l2" else part.tensor
        assert self.sparse is not None
        return envelope(self.sparse, tensor.double(), self.weight, self.beta, **self._parameters)

    def _prox(self, name: str, wide: Tensor, part: Local) -> Tensor:
        assert self.sparse is not None
        t = self.weight / self.beta
        if self.sparse != "l1_l2" or part.mesh is None:
            return prox(self.sparse, wide, t, **self._parameters)
        whole = prox(self.sparse, self._whole(name, part).to(wide.dtype), t, **self._parameters)
        return whole.narrow(0, part.first_row, wide.shape[0])

    def _whole(self, name: str, part: Local) -> Tensor:
        """The tensor with the rows of all ranks."""
        if part.mesh is None:
            return part.tensor
        sharded: Any = self._slices.tensors([name])[name].detach()
        whole: Tensor = sharded.full_tensor()
        return whole


def _coupled(model: nn.Module, example_inputs: Any, include_norm: bool) -> tuple[Slices, dict[str, Tensor]]:
    found = channel_groups(model, example_inputs, "all")
    check_channels("SparseGroupLasso", found)
    axes = found.weight_axes(include_norm)
    return Slices(model, axes, len(found)), families(found, axes)


@on_cpu
def _by_layer(
    model: nn.Module, example_inputs: Any, include_norm: bool, inputs: bool
) -> tuple[Slices, dict[str, Tensor]]:
    """One group for each filter or, with `inputs`, for each input of a linear layer."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    axes: list[Axis] = []
    layers: dict[str, Tensor] = {}
    count = 0
    seen: set[int] = set()
    for layer in find_layers(model, example_inputs):
        own = dict(layer.module.named_parameters(recurse=False)).get("weight")
        if own is None or id(own) in seen:  # computed (weight_norm, a mask), or tied
            continue
        if is_lazy(own):
            raise ValueError(
                f"model: {layer.name} has no size yet; run the model once before it is regularised"
            )
        seen.add(id(own))
        of_inputs = inputs and own.dim() == 2
        dim = 1 - layer.dim if of_inputs else layer.dim
        members = torch.arange(count, count + own.shape[dim])
        count += members.numel()
        layers[layer.name] = members
        axes.append(Axis(_path(layer.name), dim, "in" if of_inputs else "out", members))
        gamma = layer.gamma
        if include_norm and not of_inputs and isinstance(gamma, nn.Parameter) and id(gamma) not in seen:
            seen.add(id(gamma))
            axes.append(Axis(_path(layer.norm_name or ""), 0, "scale", members))
    check_regularizes_something(
        "SparseGroupLasso", count, "no convolution or linear layer has a weight that is a parameter"
    )
    return Slices(model, axes, count), layers


def _path(module: str) -> str:
    return f"{module}.weight" if module else "weight"


@on_cpu
def _sizes(slices: Slices) -> Tensor:
    """The number of entries of each group."""
    counts = torch.zeros(len(slices), dtype=torch.float64)
    tensors = slices.tensors()
    for axis in slices.axes:
        shape = tensors[axis.name].shape
        members = axis.groups[axis.groups >= 0]
        each = shape.numel() // shape[axis.dim] if shape[axis.dim] else 0
        counts.index_add_(0, members, torch.full((members.numel(),), float(each), dtype=torch.float64))
    return counts
