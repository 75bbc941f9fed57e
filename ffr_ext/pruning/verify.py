"""Does the compact model compute the same? Both are run on the example and on random inputs of the same
shapes, in eval mode; where training mode uses more of the model, that has to run as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import map_tensors, tree_map
from ..models import OUT_OF_MEMORY, deep_copy, evaluating, output_tensors
from .graph.trace import TracedGraph

# Largest difference of the outputs, relative to the largest output, that is rounding and not a mistake. Sums
# in another order differ by a few units of the last place per layer; half precision is checked in float64,
# where only the rounding of absorbed biases is left.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Mismatch(Exception):
    """The compact model fails, or computes something else."""


class Check:
    """The source's outputs, kept to compare candidates with."""

    def __init__(self, source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.source = source
        self.calls = [(args, kwargs)]
        self.references = [_source_outputs(source, (args, kwargs), random=False)]
        self._run_on_random_inputs()
        if not any(self.references):
            raise ValueError(
                f"compact: {type(source).__name__} returns no tensors for example_inputs, so nothing can "
                "be compared"
            )
        if not any(bool(t.isfinite().any()) for references in self.references for t in references):
            raise ValueError(
                f"example_inputs: {type(source).__name__} gives no finite number for them (an empty batch, or "
                "NaN?), so nothing can be compared"
            )
        self.max_output = max((_largest(t) for r in self.references for t in r), default=0.0)
        dtypes = {p.dtype for p in source.parameters() if p.is_floating_point()} or {torch.float32}
        self.dtype = max(dtypes, key=lambda d: TOLERANCE.get(d, 0.0))
        self._double: list[list[Tensor]] | None = None  # the source's outputs in float64
        self._not_in_double: str | None = None
        self._rounding: dict[float, float] = {}  # errors that are large by rounding -> the same in float64
        self.in_training_too = False

    def _run_on_random_inputs(self) -> None:
        """Whole numbers stay those of the example where the source takes them in that order only (sorted lengths)."""
        call = _random_call(*self.calls[0])
        try:
            reference = _source_outputs(self.source, call, random=True)
        except ValueError:
            call = _random_call(*self.calls[0], whole_numbers=False)
            reference = _source_outputs(self.source, call, random=True)
        self.calls.append(call)
        self.references.append(reference)

    def require_training_mode(self) -> str | None:
        """From now on candidates have to run in training mode too. If the source does not, its error instead."""
        failure = failure_in_training_mode(self.source, *self.calls[0])
        self.in_training_too = failure is None
        return failure

    def error(self, candidate: nn.Module) -> float:
        """Largest difference of the outputs in the models' own dtype. Mismatch where the candidate cannot
        run."""
        largest = max(
            _difference(reference, self._run(candidate, call))
            for call, reference in zip(self.calls, self.references, strict=True)
        )
        if self.in_training_too and (failure := failure_in_training_mode(candidate, *self.calls[0])):
            raise Mismatch(f"in training mode, {failure}")
        return largest

    def require_equal(self, candidate: nn.Module) -> float:
        """`error`, or Mismatch where it is more than rounding."""
        error = self.error(candidate)
        allowed = TOLERANCE.get(self.dtype, 1e-5) * max(self.max_output, 1e-3)
        if error <= allowed and self.dtype in (torch.float32, torch.float64):
            return error
        if self.dtype == torch.float64:
            raise Mismatch(f"the outputs differ by {error:.3g}")
        exact = self._error_in_double(candidate)
        if exact is None:
            if error > allowed:
                raise Mismatch(
                    f"the outputs differ by {error:.3g} in {self.dtype}, and {type(self.source).__name__} does not run "
                    f"in float64, which would tell rounding from a mistake: {self._not_in_double}"
                )
            return error
        if exact > allowed:
            raise Mismatch(f"the outputs differ by {exact:.3g} in float64, {error:.3g} in {self.dtype}")
        if error > allowed:
            self._rounding[error] = exact
        return error

    def remark(self, error: float) -> str | None:
        """What to say of an `error` that `require_equal` let pass although it is large."""
        if error not in self._rounding:
            return None
        return (
            f"in {str(self.dtype).removeprefix('torch.')} the outputs differ by {error:.3g}, in float64 by "
            f"{self._rounding[error]:.3g}: the models compute the same, and rounding decides otherwise in places, as "
            "where scores that are equal up to rounding change places in a topk, sort, argmax or comparison"
        )

    def _run(self, model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
        try:
            return _outputs(model, *call)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:  # the model's own code decides what a wrong size raises
            raise Mismatch(f"{type(error).__name__}: {error}") from error

    def _error_in_double(self, candidate: nn.Module) -> float | None:
        """What is left without rounding: both models and the inputs in float64. None where the source does not run so,
        and `_not_in_double` says why."""
        calls = [tree_map(_to_double, call) for call in self.calls]
        if self._double is None and self._not_in_double is None:
            source = deep_copy(self.source).double()
            try:
                with _AllInDouble():
                    self._double = [self._run(source, c) for c in calls]
            except Mismatch as failure:
                self._not_in_double = str(failure)
        if self._double is None:
            return None
        compact = deep_copy(candidate).double()
        with _AllInDouble():
            return max(
                _difference(r, self._run(compact, c)) for c, r in zip(calls, self._double, strict=True)
            )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CASTS = (Tensor.half, Tensor.bfloat16, Tensor.float)


class _AllInDouble(TorchFunctionMode):
    """Inside, the dtypes that a forward names (`x.to(torch.bfloat16)`, `x.float()`) are float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value in _FLOATS else value

        if func in _CASTS:
            func = Tensor.double
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def _outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    # Inputs are copied: a model may write to them.
    args, kwargs = map_tensors(Tensor.clone, (args, kwargs))
    with evaluating(model):
        return output_tensors(model(*args, **kwargs))


def _source_outputs(
    source: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], random: bool
) -> list[Tensor]:
    try:
        return _outputs(source, *call)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # whatever the model's own code raises for inputs that do not fit it
        what = "random inputs of their shapes" if random else "them"
        raise ValueError(
            f"example_inputs: {type(source).__name__} fails on {what} in eval mode: "
            f"{type(error).__name__}: {error}"
        ) from error


def _difference(reference: list[Tensor], outputs: list[Tensor]) -> float:
    if [r.shape for r in reference] != [o.shape for o in outputs]:
        raise Mismatch(
            f"output shapes {[tuple(o.shape) for o in outputs]}, expected "
            f"{[tuple(r.shape) for r in reference]}"
        )
    largest = 0.0
    for r, o in zip(reference, outputs, strict=True):
        if r.numel() == 0:
            continue
        same = (r == o) | (r.isnan() & o.isnan())
        difference = torch.where(same, 0.0, (r.double() - o.double()).abs())
        if bool(difference.isnan().any()):
            return float("inf")
        largest = max(largest, float(difference.max()))
    return largest


def _largest(tensor: Tensor) -> float:
    finite = tensor.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def _random_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], whole_numbers: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the same shapes: normal numbers of the example's mean and deviation; whole numbers (tokens,
    masks) are the example's in another order, because nobody here knows which values are valid. A fixed seed:
    all ranks make the same."""
    generator = torch.Generator("cpu").manual_seed(0x5EED)

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() < 2:
            return value
        if not value.is_floating_point():
            if not whole_numbers:
                return value
            order = torch.randperm(value.numel(), generator=generator, device="cpu").to(value.device)
            return value.reshape(-1)[order].reshape(value.shape)
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
        noise = noise.to(value.device)
        deviation = value.double().std()
        deviation = deviation if bool(deviation > 0) else torch.ones_like(deviation)
        return (noise * deviation + value.double().mean()).to(value.dtype)

    result: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(fresh, (args, kwargs))
    return result


def _to_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def unreached_parameters(graph: TracedGraph, model: nn.Module) -> list[str]:
    """Parameters that no op of the graph reads."""
    read = {name for node, name in graph.tensor_names.items() if node.users}
    return [name for name, _ in model.named_parameters() if graph.name_of[name] not in read]


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The model in training mode and no gradients inside. What a forward pass changes then (counts, statistics) stays
    so."""
    gpus = {p.device.index for p in model.parameters() if p.is_cuda}
    with evaluating(model):
        for module in model.modules():
            module.training = not isinstance(module, nn.SyncBatchNorm)  # which would wait for the other ranks
        # Dropout draws from the generators, and leaves them as they were.
        with torch.random.fork_rng(gpus, device_type="cuda"):
            yield


def failure_in_training_mode(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What a forward pass in training mode raises, if anything. Of the model nothing changes."""
    trial = deep_copy(model)  # a forward pass in training mode counts batches and keeps statistics
    args, kwargs = map_tensors(Tensor.clone, (args, kwargs))
    try:
        with training(trial):
            trial(*args, **kwargs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # the model's own code decides what a wrong size raises
        return f"{type(error).__name__}: {error}"
    return None
