"""What a StructuredOutput will do, before any training: its chains, their shapes, what they share with the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .chains import ACTIVATIONS, Chain

if TYPE_CHECKING:
    from .tasks import StructuredOutput

# Outputs that a last activation cannot reach, so labels there are never reconstructed.
_RANGES: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.ReLU: (0.0, float("inf")),
    nn.Softplus: (0.0, float("inf")),
}


@dataclass(frozen=True)
class TaskDescription:
    """One task of a :class:`Description`.

    Attributes:
        task: ``"input"`` or ``"output"``. weight: what its term is multiplied by now.
        layers: names of the chain's modules in call order.
        steps: what is run, from the data to its reconstruction, with the shape behind each step if an example
            was given.
        shared: names of the model's parameters that the task trains. own: those of the mirror.
        notes: what is worth knowing before training.
    """

    task: str
    weight: float
    layers: tuple[str, ...]
    steps: tuple[str, ...]
    shared: tuple[str, ...]
    own: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.task} task, weight {self.weight:g}", *(f"  {step}" for step in self.steps)]
        lines.append(f"  shared with the model: {', '.join(self.shared) or 'nothing'}")
        lines.append(f"  of the mirror: {', '.join(self.own) or 'nothing'}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Description:
    """Returned by :meth:`StructuredOutput.describe`; its string is what that prints."""

    tasks: tuple[TaskDescription, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.tasks))


def describe(tasks: StructuredOutput, x: Tensor | None, y: Tensor | None) -> Description:
    """See :meth:`StructuredOutput.describe`."""
    given = {"input": x, "output": y}
    with _measuring(tasks):
        return Description(tuple(_describe(tasks, task, given[task]) for task in tasks._chains))


@contextmanager
def _measuring(tasks: StructuredOutput) -> Iterator[None]:
    """Eval mode without autograd; modes and what "auto" has decided are put back."""
    modes = {m: m.training for root in (tasks.model, tasks) for m in root.modules()}
    decided = tasks.reconstruction, tasks._by_auto
    try:
        tasks.model.eval()
        tasks.eval()
        with torch.no_grad():
            yield
    finally:
        tasks.reconstruction, tasks._by_auto = decided
        for module, training in modes.items():
            module.training = training


def _describe(tasks: StructuredOutput, task: str, example: Tensor | None) -> TaskDescription:
    chain, mirror = tasks._chains[task], tasks.mirrors[task]
    name_of = {parameter: name for name, parameter in tasks.model.named_parameters()}
    own = [f"mirrors.{task}.{name} {_sizes(p.shape)}" for name, p in mirror.named_parameters()]
    return TaskDescription(
        task=task,
        weight=tasks._weights()[task],
        layers=tuple(layer.name for layer in chain.layers),
        steps=tuple(_input_steps(tasks, example) if task == "input" else _output_steps(tasks, example)),
        shared=tuple(f"{name_of[p]} {_sizes(p.shape)}" for p in chain.parameters()),
        own=tuple(own),
        notes=tuple(_notes(tasks, task, chain, example)),
    )


def _input_steps(tasks: StructuredOutput, x: Tensor | None) -> Iterator[str]:
    chain = tasks._chains["input"]
    shapes: list[Any] = [None] * (len(chain.layers) + 1)
    again = None
    if x is not None:
        again = tasks.reconstruct_input(x)
        code, before = chain.run(x, "x")
        shapes = [*before, tuple(code.shape)]
    yield f"x{_behind(shapes[0])}, {tasks.corruption:.0%} of it put to zero in training"
    for layer, shape in zip(chain.layers, shapes[1:], strict=True):
        yield f"-> {layer}{_behind(shape)}"
    end = tasks.reconstruction if isinstance(tasks.reconstruction, str) else "the given function"
    yield f"-> mirror of first, {end} at its end{_behind(None if again is None else again.shape)}"


def _output_steps(tasks: StructuredOutput, y: Tensor | None) -> Iterator[str]:
    chain = tasks._chains["output"].without_leading_activation()
    code, shapes = None, [None] * len(chain.layers)
    if y is not None:
        code = tasks.encode_output(y)
        out, before = chain.run(code, "the code of y")
        shapes = [*before[1:], tuple(out.shape)]  # type: ignore[list-item]
    yield f"y{_behind(None if y is None else y.shape)}"
    yield f"-> mirror of last, the code{_behind(None if code is None else code.shape)}"
    for layer, shape in zip(chain.layers, shapes, strict=True):
        yield f"-> {layer}{_behind(shape)}"


def _notes(tasks: StructuredOutput, task: str, chain: Chain, example: Tensor | None) -> Iterator[str]:
    if not tasks._weights()[task]:
        yield f"its weight is 0, so it is not computed; pass {task}=<its weight>"
    front = [layer.module for layer in chain.layers[: chain.lead]]
    if task == "output" and not any(isinstance(module, ACTIVATIONS) for module in front):
        yield (
            "last does not begin with an activation, so the code of y is linear (the mirror ends with the identity); "
            "where the model has one in front, let last begin with it"
        )
    if task == "output" and example is not None and type(chain.layers[-1].module) in _RANGES:
        low, high = _RANGES[type(chain.layers[-1].module)]
        least, most = (float(bound) for bound in example.aminmax())
        if least < low or most > high:
            yield f"y is in [{least:g}, {most:g}], but {chain.layers[-1]} gives values in [{low:g}, {high:g}] only"
    if task == "input" and tasks.reconstruction == "auto":
        yield "reconstruction='auto' is decided at the first x: sigmoid if it is in [0, 1], else identity"


def _behind(shape: Any) -> str:
    return "" if shape is None else f"  {_sizes(shape)}"


def _sizes(shape: Any) -> str:
    return "x".join(map(str, shape))
