"""StructuredOutput: auto-encoders of inputs and outputs that share the first and last layers of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import (
    ARGUMENTS,
    CALLED,
    RECONSTRUCTIONS,
    TASKS,
    MirrorSpec,
    Number,
    Reconstruction,
    check_given,
    check_number,
    check_tasks,
    choose_mirrors,
    choose_reconstruction,
    has_rows,
)
from .chains import Chain, ChainSpec, check_apart, check_plain, find_chain
from .description import Description, describe
from .mirrors import Mirror


class StructuredOutput(nn.Module):
    """Two tasks beside the one a network is trained for: to encode and decode its inputs with its first layers, and
    its outputs with its last.

    ::

        model = nn.Sequential(nn.Linear(2500, 256), nn.Sigmoid(), nn.Linear(256, 64), nn.Tanh(),
                              nn.Linear(64, 136), nn.Tanh())
        tasks = StructuredOutput(model, last=model[3:])
        optimizer = torch.optim.SGD([*model.parameters(), *tasks.parameters()], lr=1e-2, momentum=0.9)
        for x, y, y_all in loader:                               # y_all: y, and labels that have no input
            loss = F.mse_loss(model(x), y) + tasks.loss(y=y_all)

    With E the first layers, D the last, n a mask that is 0 with probability ``corruption`` and else 1 (only in
    training mode of both this object and the model; no rescaling), and a *mirror* the same layers backwards with
    transposed weights and biases of its own::

        J_in(x)  = mean((mirror_E(E(n * x)) - x) ** 2)            F.mse_loss(mirror_E(E(n * x)), x)
        J_out(y) = mean((D(mirror_D(y)) - y) ** 2)                F.mse_loss(D(mirror_D(y)), y)
        loss(x, y) = scale * (input_scale * input * J_in(x) + output_scale * output * J_out(y))

    The mirror of a layer ``s(W h + c)`` is ``s_below(W^T h' + d)``: ``s_below`` is the activation in front of the
    layer, ``d`` is zero at first and a parameter of this object. ``last`` begins with the activation in front of
    its first layer if there is one; without it the code is linear, and :meth:`describe` says so. Both uses of a
    weight give it gradients; layers between E and D get none.

    Args:
        model: the network; not a submodule of this one. Move it to its device first.
        first, last: E and D, a slice of an ``nn.Sequential``, a module, or modules and names in call order, of
            ``Linear``, ``Conv1d`` to ``Conv3d``, ``ConvTranspose1d`` to ``ConvTranspose3d``, elementwise
            activations, ``Flatten``, ``Unflatten``, ``Dropout`` (skipped in mirrors) and ``Identity``.
        input, output: weights of the tasks, floats >= 0. All terms are means over elements. Belharbi et al.'s
            program has a mean over the outputs and a *sum* in the auto-encoders: their weight 1 is
            ``output=Dy`` here, 136 for 68 points.
        corruption: probability in [0, 1) that an element of x is put to zero.
        reconstruction: the function at the end of the mirror of E: ``"sigmoid"``, ``"tanh"``, ``"identity"``, a
            callable, or ``"auto"``: sigmoid if the first x is in [0, 1], else identity. A run that is
            resumed decides anew.
        mirror: ``"tied"``; ``"free"``, which gives mirrors weights of their own that begin as copies; or a module
            for chains that have no mirror (norms, pooling, residual blocks): y -> code for ``last``, where an
            activation in front of ``last`` is the module's business, code -> x for ``first``; for both a dict
            ``{"input": ..., "output": ...}``. With a module, ``"auto"`` means identity.

    ``input``, ``output``, ``scale``, ``input_scale`` and ``output_scale`` are floats that may be set during
    training; a task whose product is 0 is not computed. ``state_dict()`` holds the biases alone (and the weights
    of free mirrors).

    The layers are called without their hooks, so a FeatureFlow on the same model does not see these passes (modules
    inside a block that a mirror of the user's allows are called as ever).

    Source: Belharbi, Herault, Chatelain, Adam, "Deep Neural Networks Regularization for Structured Output
    Prediction", arXiv 1504.07550, and their program. Ours: means everywhere, one sum instead of three optimiser
    steps a batch, convolutions, no centring of hidden units, no weight decay of its own.

    Raises:
        TypeError: an argument of another kind. ValueError: a task with a weight and no chain, layers that cannot
            be mirrored, shared or overlapping parts, a compiled or scripted model; the message names the layer.
    """

    model: nn.Module
    input = Number()
    output = Number()
    scale = Number()
    input_scale = Number()
    output_scale = Number()

    def __init__(
        self,
        model: nn.Module,
        first: ChainSpec | None = None,
        last: ChainSpec | None = None,
        *,
        input: float = 0.0,
        output: float = 1.0,
        corruption: float = 0.2,
        reconstruction: Reconstruction = "auto",
        mirror: MirrorSpec = "tied",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_plain(f"model: {type(model).__name__}", model)
        object.__setattr__(self, "model", model)  # nn.Module would make it a submodule
        self.input, self.output = input, output
        self.scale = self.input_scale = self.output_scale = 1.0
        self.corruption = check_number("corruption", corruption)
        if self.corruption >= 1:
            raise ValueError(f"corruption: expected a probability in [0, 1), got {corruption}")
        check_given(self.input, self.output, first, last)
        mirrors = choose_mirrors(mirror, first is not None, last is not None)
        self._chains = {
            task: find_chain(model, argument, spec, mirrored=isinstance(mirrors[task], str))
            for task, argument, spec in (("input", "first", first), ("output", "last", last))
            if spec is not None
        }
        if len(self._chains) == 2:
            check_apart(model, self._chains["input"], self._chains["output"])
        self.mirrors = nn.ModuleDict(
            {task: _mirror(model, task, chain, mirrors[task]) for task, chain in self._chains.items()}
        )
        self.reconstruction = choose_reconstruction(reconstruction, mirrors["input"])
        self._by_auto = False
        self._last: dict[str, Tensor] | None = None

    def loss(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The weighted tasks, a 0-dim tensor.

        Args:
            x: (B, ...) inputs of the model, with or without labels. y: (N, ...) outputs of it, with or without
                inputs, N and B independent; see :func:`split`. None and no rows leave the task out.

        What is given for a task without a chain or a weight is not looked at. The loss is 0 and carries no
        gradient where every weight is 0 or no rows came.

        Raises:
            ValueError: neither ``x`` nor ``y`` for a task with a chain; NaN; another width; x outside [0, 1]
                where ``"auto"`` chose the sigmoid before; all parameters of the chain frozen.
            TypeError: no floating-point tensor, or a dtype other than the weights'.
            RuntimeError: the layers changed their shape since the mirrors were made.
        """
        given = {"input": x, "output": y}
        data = {task: t for task, t in given.items() if t is not None and task in self._chains}
        if not data:
            wanted = " or ".join(CALLED[task] for task in self._chains)
            raise ValueError(f"loss: expected {wanted}, got none: there is no term to compute")
        weights = self._weights()
        computed = {task: t for task, t in data.items() if weights[task] and has_rows(CALLED[task], t)}
        for task, tensor in computed.items():
            self._check(task, tensor)
            self._check_trains(task)
        terms = {task: self._term(task, tensor) for task, tensor in computed.items()}
        self._last = {task: term.detach() for task, term in terms.items()}
        total = _zero(self._chains[next(iter(data))])
        for task, term in terms.items():
            total = total + (weights[task] * term).to(total.device)
        return total

    def terms(self) -> dict[str, Tensor]:
        """The terms of the last :meth:`loss`, ``{"input": J_in, "output": J_out}``, detached and without weights, to
        log. Those that were not computed are not there.

        Raises:
            RuntimeError: there was no loss yet.
        """
        if self._last is None:
            raise RuntimeError("terms: expected a call of loss() before")
        return dict(self._last)

    def encode_output(self, y: Tensor) -> Tensor:
        """``mirror_D(y)``, the code of outputs: what the first layer of ``last`` reads."""
        self._check("output", y)
        return self._encode(y)

    def decode(self, code: Tensor) -> Tensor:
        """``D(code)``, outputs. The activation in front of the first layer of ``last`` is part of the code."""
        return self._chain("output").without_leading_activation().run(code, "code")[0]

    def reconstruct_input(self, x: Tensor) -> Tensor:
        """``mirror_E(E(x))``, without corruption."""
        self._check("input", x)
        return self._reconstruct(x)

    def describe(self, x: Tensor | None = None, y: Tensor | None = None) -> Description:
        """Print both chains with the shapes that pass through them, the parameters shared with the model and
        what is worth knowing before training; return that.

        ``x``, ``y``: examples, run in eval mode and without autograd; nothing of it stays behind. Without them
        no shapes are shown.
        """
        description = describe(self, x, y)
        print(description)
        return description

    def scale_weights(self, factor: float, weights: Iterable[str] = TASKS) -> None:
        """Set ``input_scale``, ``output_scale`` or both: what a schedule calls."""
        for task in check_tasks("weights", weights):
            setattr(self, f"{task}_scale", factor)

    def extra_repr(self) -> str:
        return f"input={self.input:g}, output={self.output:g}, corruption={self.corruption:g}"

    def _weights(self) -> dict[str, float]:
        return {
            "input": self.scale * self.input_scale * self.input,
            "output": self.scale * self.output_scale * self.output,
        }

    def _chain(self, task: str) -> Chain:
        if task not in self._chains:
            argument = ARGUMENTS[task]
            raise ValueError(
                f"{argument}: expected the layers of the {task} task, but {argument}=None was given"
            )
        return self._chains[task]

    def _term(self, task: str, tensor: Tensor) -> Tensor:
        if task == "output":
            again = self.decode(self._encode(tensor))
        else:
            again = self._reconstruct(
                tensor, self.corruption if self.training and self.model.training else 0.0
            )
        if again.shape != tensor.shape:
            raise ValueError(
                f"{CALLED[task]}: of shape {tuple(tensor.shape)}, comes back as {tuple(again.shape)}; is it of another "
                f"size than the {task}s of the model?"
            )
        wide = torch.promote_types(tensor.dtype, torch.float32)
        return F.mse_loss(again.to(wide), tensor.to(wide))

    def _encode(self, y: Tensor) -> Tensor:
        mirror = self.mirrors["output"]
        code: Tensor = mirror(y, "y") if isinstance(mirror, Mirror) else mirror(y)
        return code

    def _reconstruct(self, x: Tensor, corruption: float = 0.0) -> Tensor:
        end = self._end(x)
        if corruption:
            x = x.masked_fill(torch.rand(x.shape, device=x.device) < corruption, 0)
        mirror = self.mirrors["input"]
        code, shapes = self._chain("input").run(x, "x")
        return end(mirror(code, "the code of x", shapes) if isinstance(mirror, Mirror) else mirror(code))

    def _end(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The function at the end of the mirror of E. What "auto" means is decided at the first x."""
        if self.reconstruction == "auto":
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "reconstruction: 'auto' looks at the first x, which a compiled graph cannot; name the function, or "
                    "call loss() once before"
                )
            low, high = x.aminmax()
            self.reconstruction, self._by_auto = ("sigmoid" if low >= 0 and high <= 1 else "identity"), True
        return (
            RECONSTRUCTIONS[self.reconstruction]
            if isinstance(self.reconstruction, str)
            else self.reconstruction
        )

    def _check(self, task: str, tensor: Any) -> None:
        """TypeError or ValueError for what is no batch of the task."""
        chain, called = self._chain(task), CALLED[task]
        has_rows(called, tensor)
        like = next(chain.parameters())
        if tensor.device != like.device:
            raise ValueError(
                f"{called}: expected a tensor on {like.device}, as the layers are, got {tensor.device}"
            )
        if tensor.dtype != like.dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise TypeError(f"{called}: expected {like.dtype}, as the layers have, got {tensor.dtype}")
        if isinstance(self.mirrors[task], Mirror):
            chain.check_end(tensor, called)
        if not torch.compiler.is_compiling() and tensor.numel():
            self._check_values(called, tensor)

    def _check_values(self, called: str, tensor: Tensor) -> None:
        low, high = (float(bound) for bound in tensor.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"{called}: expected finite numbers, got {int((~tensor.isfinite()).sum())} that are not, of "
                f"{tensor.numel()}; ffr_ext.structured.split(x, y) leaves rows of NaN out"
            )
        if called == "x" and self._by_auto and self.reconstruction == "sigmoid" and not 0 <= low <= high <= 1:
            raise ValueError(
                f"x: reconstruction='auto' chose the sigmoid by the first x, but now values from {low:g} to {high:g} "
                "came; pass reconstruction='identity'"
            )

    def _check_trains(self, task: str) -> None:
        if torch.is_grad_enabled() and not any(p.requires_grad for p in self._chains[task].parameters()):
            raise ValueError(
                f"{ARGUMENTS[task]}: all parameters are frozen, so the {task} task would change nothing in the model"
            )


def _mirror(model: nn.Module, task: str, chain: Chain, mirror: str | nn.Module) -> nn.Module:
    if isinstance(mirror, str):
        return Mirror(chain, free=mirror == "free", activate_front=task == "output")
    check_plain(f"mirror: {type(mirror).__name__}", mirror)
    if not set(mirror.parameters()).isdisjoint(model.parameters()):
        raise ValueError(
            "mirror: expected a module with parameters of its own, got some of the model's, which an optimizer would "
            "be given twice"
        )
    return mirror


def _zero(chain: Chain) -> Tensor:
    like = next(chain.parameters())
    return torch.zeros((), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
