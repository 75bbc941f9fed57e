"""`synthesize`: the next generation of a network, of which the weak parts are likely to be missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import at_least_one, check_choice
from ..models import all_tensors, canonical_names, deep_copy
from .compaction import Compaction, compact
from .graph.groups import SCOPES, ChannelGroups, channel_groups
from .graph.groups.shards import local_parts
from .graph.groups.survival import LEVELS, check_environment, check_generator, draw_channels, draw_synapses
from .ranks import check_same_on_all_ranks
from .scale import find_layers
from .surgery import optimizer as optimizer_state
from .surgery.cuts import cut_tensors
from .surgery.plan import CompactionPlan, check_plain_module


@dataclass(frozen=True)
class Synthesis(Compaction):
    """The offspring: a `Compaction` and, at the level of synapses, which of its weights are alive.

    Attributes:
        masks: name of a weight of ``model`` -> bool, True for the synapses that are there.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def keep_dead_(self) -> None:
        """Zero the dead synapses again: after every ``optimizer.step()``, whose momentum and gradients revive them."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            tensors[name].mul_(mask)


def synthesize(
    model: nn.Module,
    example_inputs: Any,
    *,
    environment: float = 1.0,
    level: str = "channel",
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    inherit: bool = True,
    offspring: int = 1,
    evaluate: Callable[[nn.Module], float] | None = None,
    scope: str = "inner",
    measure: bool = True,
) -> Synthesis:
    """Draw which channels or synapses of a model survive, zero the others, and cut out exactly what can leave.

    Evolutionary synthesis as in StressedNets (Shafiee et al., 2018/2019) and its predecessors. A part survives with
    the probability ::

        environment * exp(S / Z - 1)              in [1/e, 1] times environment

    where S is the strength of a channel (its effective scale behind batch norms, else the root of its energy) or of a
    synapse (\\|w\\|), and Z the largest of the layer. The formula is our reading; that most weights are far below the
    largest makes about 1/e of the synapses survive with ``environment=1``. ::

        generator = torch.Generator().manual_seed(0)
        for generation in range(5):
            train(model)                                    # with `ffr_ext.regularizers.Stress`, for instance
            child = synthesize(model, x, optimizer=optimizer, generator=generator)
            model = child.model

    Args:
        model: Any module that `compact` takes. It is not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs.
        environment: The resources of the next generation, a finite number above 0.
        level: ``"channel"``: whole channels, which leave the model; of every layer the strongest stays. ``"synapse"``:
            single weights of convolutions and linear layers, which become 0; what is 0 already stays dead.
        optimizer: The optimizer that trains ``model``: it goes on with the result, without momentum for dead synapses.
        generator: Of the CPU; go on with one through the generations. None: a fresh one of seed 0. Ranks need the same.
        inherit: False makes the survivors newborn: ``reset_parameters()`` of every module, seeded by ``generator``, and
            an optimizer without state.
        offspring: How many are drawn; the one of the lowest ``evaluate(child)`` is returned.
        evaluate: A function of a model to a number, such as its training loss.
        scope: Which channels may leave, see `channel_groups`.
        measure: As of `compact`.

    Returns:
        `Synthesis`: a `Compaction`, with ``.masks`` for synapses.

    Raises:
        TypeError, ValueError: An argument is not as above, the model has nothing to draw, or its weights are not
            finite. Nothing is changed then.
    """
    check_plain_module(model, "synthesize")
    factor = check_environment(environment)
    check_choice("level", level, LEVELS)
    check_choice("scope", scope, SCOPES)
    if not isinstance(inherit, bool):
        raise TypeError(f"inherit: expected True or False, got {inherit!r}")
    count = at_least_one("offspring", offspring)
    if count > 1 and not callable(evaluate):
        raise ValueError(
            "evaluate: several offspring need a function of a model to a number, to keep the best"
        )
    optimizer_state.check_optimizer(optimizer)
    random = check_generator(generator)
    parent = (
        _Channels(model, example_inputs, scope) if level == "channel" else _Synapses(model, example_inputs)
    )
    best: Synthesis | None = None
    lowest = float("inf")
    for _ in range(count):
        child = _bear(model, example_inputs, parent, factor, random, inherit, measure)
        score = float(evaluate(child.model)) if evaluate is not None and count > 1 else 0.0
        if best is None or score < lowest:
            best, lowest = child, score
    assert best is not None
    if optimizer is not None:
        _carry_over(optimizer, model, best, inherit)
    return best


class _Channels:
    """A parent whose channels survive or not."""

    def __init__(self, model: nn.Module, example_inputs: Any, scope: str) -> None:
        self.groups: ChannelGroups = channel_groups(model, example_inputs, scope)
        if len(self.groups) == 0:
            reasons = "; ".join([*self.groups.pinned, *self.groups.unknown])
            raise ValueError(f"model: synthesize finds no channel that may leave: {reasons}")

    def draw(self, environment: float, generator: torch.Generator) -> dict[str, Tensor]:
        return {"channels": draw_channels(self.groups, environment, generator)}

    def zero_(self, child: nn.Module, alive: Mapping[str, Tensor]) -> None:
        self.groups.zero_(~alive["channels"], child)

    def masks(self, alive: Mapping[str, Tensor], plan: CompactionPlan) -> dict[str, Tensor]:
        return {}


class _Synapses:
    """A parent whose single weights survive or not."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        names = canonical_names(model)
        weights = [
            f"{layer.name}.weight" if layer.name else "weight" for layer in find_layers(model, example_inputs)
        ]
        own = dict(model.named_parameters(remove_duplicate=False))
        self.weights = {names[name]: own[name] for name in weights if name in own}
        if not self.weights:
            raise ValueError(
                "model: synthesize finds no weight of a convolution or linear layer that is a parameter"
            )

    def draw(self, environment: float, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = [tuple(w.shape) for w in self.weights.values()]
        drawn = draw_synapses(local_parts(self.weights.values()), shapes, environment, generator)
        return dict(zip(self.weights, drawn, strict=True))

    @torch.no_grad()
    def zero_(self, child: nn.Module, alive: Mapping[str, Tensor]) -> None:
        tensors = dict(child.named_parameters(remove_duplicate=False))
        for name, mask in alive.items():
            tensors[name].mul_(mask)

    def masks(self, alive: Mapping[str, Tensor], plan: CompactionPlan) -> dict[str, Tensor]:
        names = [n for n in alive if not any(n.startswith(f"{path}.") for path in plan.replaced)]
        cut = cut_tensors([alive[n] for n in names], [plan.cuts.get(n, []) for n in names])
        return dict(zip(names, cut, strict=True))


def _bear(
    model: nn.Module,
    example_inputs: Any,
    parent: _Channels | _Synapses,
    environment: float,
    generator: torch.Generator,
    inherit: bool,
    measure: bool,
) -> Synthesis:
    with check_same_on_all_ranks() as agree:
        alive = parent.draw(environment, generator)
        agree(_digest(alive))
    child = deep_copy(model)
    parent.zero_(child, alive)
    result = compact(child, example_inputs, inplace=True, measure=measure)
    offspring = Synthesis(result.model, result.plan, result.report, parent.masks(alive, result.plan))
    if not inherit:
        _make_newborn(offspring, generator)
    return offspring


def _make_newborn(offspring: Synthesis, generator: torch.Generator) -> None:
    seed = int(torch.randint(2**62, (), generator=generator))
    gpus = sorted({p.device.index for p in offspring.model.parameters() if p.is_cuda})
    with torch.random.fork_rng(gpus, device_type="cuda"):
        torch.manual_seed(seed)
        for module in offspring.model.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    offspring.keep_dead_()


def _digest(alive: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, mask in alive.items():
        digest.update(name.encode() + bytes(mask.flatten().to(torch.uint8).cpu().tolist()))
    return digest.hexdigest()


@torch.no_grad()
def _carry_over(
    optimizer: torch.optim.Optimizer, source: nn.Module, offspring: Synthesis, inherit: bool
) -> None:
    try:
        optimizer_state.carry_over(optimizer, source, offspring.model, offspring.plan)
    except optimizer_state.OptimizerError as error:
        raise ValueError(str(error)) from error
    tensors = dict(all_tensors(offspring.model))
    if not inherit:
        for tensor in tensors.values():
            optimizer.state.pop(tensor, None)
    for name, mask in offspring.masks.items():
        for value in optimizer.state.get(tensors[name], {}).values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value.mul_(mask)
