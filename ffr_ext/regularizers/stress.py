"""`Stress`: training with weak parts attenuated, as the next synthesis is likely to take them away."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import at_least_one, check_choice
from ..models import canonical_names
from ..pruning.graph.groups import ChannelGroups, channel_groups
from ..pruning.graph.groups.shards import local_parts
from ..pruning.graph.groups.slices import Axis, Slices
from ..pruning.graph.groups.survival import LEVELS, check_generator, draw_channels, draw_synapses, scale_axes
from ..pruning.scale import find_layers
from .base import BaseRegularizer, finite
from .oicsr import check_channels
from .penalty import check_regularizes_something

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self needs Python 3.11


class Stress(BaseRegularizer):
    """A context around forward and backward pass in which weak channels or synapses are attenuated.

    StressedNets (Shafiee et al.): on every ``every``-th mini-batch survivors are drawn as `synthesize` draws them with
    ``environment=1``, and the weights of the others are multiplied by ``attenuation``, their gradients too: the loss is
    that of the attenuated network as a function of the weights. Afterwards the weights are what they were, bit for bit.
    ``attenuation=1`` leaves training as it is, ``0`` is a dropout that matches the synthesis. (The formula is our
    reading of the paper's words, see `synthesize`.) ::

        stress = Stress(model, x)
        for x, y in loader:
            optimizer.zero_grad()
            with stress:
                criterion(model(x), y).backward()
            optimizer.step()

    A channel with norms is attenuated in the norm's scale and shift, which keeps running statistics as they are;
    without, in its filter and bias. As a regularizer it has no loss: trainers call `before_forward` and
    `after_backward`. ``scale`` s makes the attenuation ``1 - s (1 - attenuation)``, at least 0.

    Args:
        model: any module that `channel_groups` can trace; wrap it afterwards (DDP, ``fully_shard``, ``torch.compile``).
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        attenuation: what the weights of the others are multiplied by, in [0, 1].
        every: a whole number of at least 1.
        level: ``"channel"`` or ``"synapse"``, see `synthesize`.
        generator: of the CPU; None: a fresh one of seed 0. Ranks need the same, which is checked at the first draw.

    Raises:
        TypeError, ValueError: an argument is not as above, or the model has nothing to attenuate.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        attenuation: float = 0.8,
        every: int = 2,
        level: str = "channel",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model)
        self.attenuation = finite("attenuation", attenuation)
        if not 0 <= self.attenuation <= 1:
            raise ValueError(f"attenuation: expected a number in 0 .. 1, got {attenuation!r}")
        check_choice("level", level, LEVELS)
        self.every, self.level = at_least_one("every", every), level
        self.generator = check_generator(generator)
        self.batches = 0
        groups = channel_groups(model, example_inputs) if level == "channel" else None
        if groups is not None:
            check_channels("Stress", groups)
        self._weak = _Channels(groups) if groups is not None else _Synapses(model, example_inputs)
        self._kept: list[_Attenuated] = []
        self._checked = False

    @property
    def active_attenuation(self) -> float:
        """What weights are multiplied by now."""
        return max(0.0, 1 - self.scale * (1 - self.attenuation)) if self.enabled else 1.0

    def loss(self) -> Tensor:
        """0: stress has no penalty."""
        return torch.zeros(())

    def add_gradients_(self) -> None:
        """Nothing: the gradients of the backward pass are those of the attenuated network already."""

    def __enter__(self) -> Self:
        self.before_forward()
        return self

    def __exit__(self, *exception: object) -> None:
        self.after_backward()

    def before_forward(self) -> None:
        """Attenuate, on every ``every``-th call while enabled."""
        if self._kept:
            raise RuntimeError("Stress: before_forward() twice without after_backward() in between")
        if not self.enabled:
            return
        self.batches += 1
        alpha = self.active_attenuation
        if self.batches % self.every or alpha == 1:
            return
        if not self._checked:
            _check_same_generator(self.generator)
            self._checked = True
        for tensor, factor in self._weak.factors(alpha, self.generator):
            self._kept.append(_Attenuated(tensor, factor))

    def after_backward(self) -> None:
        """Restore the weights."""
        kept, self._kept = self._kept, []
        for attenuated in kept:
            attenuated.restore()

    def state_dict(self) -> dict[str, Any]:
        """The scale, the number of mini-batches, and the generator's state."""
        return {**super().state_dict(), "batches": self.batches, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if not isinstance(state, Mapping) or not {"scale", "batches", "generator"} <= state.keys():
            raise ValueError(f"state: expected what state_dict() returned, got {state!r}")
        super().load_state_dict(state)
        self.batches = int(state["batches"])
        self.generator.set_state(state["generator"])


class _Attenuated:
    """A weight multiplied by a factor until it is restored, and what its gradient needs to be that of the product."""

    @torch.no_grad()
    def __init__(self, tensor: Tensor, factor: Tensor) -> None:
        self.tensor, self.factor = tensor, factor
        (part,) = local_parts([tensor])
        self.local, self.sharded = part.tensor, part.mesh is not None
        self.before = self.local.clone()
        self.grad: Tensor | None = None
        self.hook: Any = None
        if self.sharded:  # fully_shard writes the gradient of a shard itself, and calls no hook
            self.grad, tensor.grad = tensor.grad, None
        elif tensor.requires_grad:
            self.hook = tensor.register_hook(lambda grad: grad * factor)
        self.local.mul_(factor)

    @torch.no_grad()
    def restore(self) -> None:
        self.local.copy_(self.before)
        if self.hook is not None:
            self.hook.remove()
        if self.sharded:
            if self.tensor.grad is not None:
                local_parts([self.tensor.grad])[0].tensor.mul_(self.factor)
                if self.grad is not None:
                    self.tensor.grad.add_(self.grad)
            else:
                self.tensor.grad = self.grad


class _Channels:
    """What to multiply where channels do not survive."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        scales, behind = scale_axes(groups)
        norms = {id(groups.owner(axis.name)) for axis in scales}
        self.axes: list[tuple[Axis, Tensor]] = []  # and the groups that are attenuated there
        for axis in groups.axes:
            of_norm = axis.role == "scale" or id(groups.owner(axis.name)) in norms
            if axis.role != "in" and isinstance(groups.tensors([axis.name])[axis.name], nn.Parameter):
                self.axes.append((axis, behind if of_norm else ~behind))

    def factors(self, alpha: float, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        weak = ~draw_channels(self.groups, 1.0, generator)
        names = [axis.name for axis, _ in self.axes]
        tensors = self.groups.tensors(dict.fromkeys(names))
        found = []
        for (axis, where), part in zip(self.axes, self.groups.local(names), strict=True):
            vector = torch.ones(len(weak), dtype=part.tensor.dtype, device="cpu")
            vector[weak & where] = alpha
            factor = self.groups.spread([axis], [part], vector, 1.0)[0]
            shape = [1] * part.tensor.dim()
            shape[axis.dim] = factor.numel()
            found.append((tensors[axis.name], factor.view(shape)))
        return found


class _Synapses:
    """What to multiply where single weights do not survive."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        names = canonical_names(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        layers = find_layers(model, example_inputs)
        weights = [f"{layer.name}.weight" if layer.name else "weight" for layer in layers]
        self.names = list(dict.fromkeys(names[name] for name in weights if name in own))
        check_regularizes_something("Stress", len(self.names), "no convolution or linear layer has a weight")
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.slices = Slices(model, [Axis(name, 0, "out", none) for name in self.names], 0)

    def factors(self, alpha: float, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        tensors = list(self.slices.tensors(self.names).values())
        parts = self.slices.local(self.names)
        alive = draw_synapses(parts, [tuple(t.shape) for t in tensors], 1.0, generator)
        return [
            (tensor, torch.full_like(part.tensor, alpha).masked_fill_(mask, 1.0))
            for tensor, part, mask in zip(tensors, parts, alive, strict=True)
        ]


def _check_same_generator(generator: torch.Generator) -> None:
    """RuntimeError where ranks would draw different survivors and train apart."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    mine = hashlib.sha256(bytes(generator.get_state().tolist())).hexdigest()
    everyone: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        raise RuntimeError(
            "Stress: generator: the ranks have generators in different states; seed them alike"
        )
