"""Any user's model: how it is called, put in eval mode, copied, and what its tensors are called."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._torch import keep_hooks, tree_leaves

# Says nothing of the model: never turned into an error that does.
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)

# Whose hooks are part of a model: torch.nn.utils computes weights from other parameters in them, transformers collects
# hidden states, for its own decoders too.
_PART_OF_THE_MODEL = ("torch.nn.utils.", "transformers.")


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as the positional and keyword arguments of one call of the model."""
    for value in tree_leaves(example_inputs):
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
            raise ValueError(f"example_inputs: expected dense (strided) tensors, got {kind}")
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs: expected a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(example_inputs).__name__}"
    )


def output_tensors(result: Any) -> list[Tensor]:
    """The tensors that a model returns, also those inside objects that no pytree knows. A cache of transformers is no
    output but a state: what the same model reads in its next call."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def look_into(value: Any) -> None:
        for leaf in tree_leaves(value, is_leaf=_is_cache):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif not _is_cache(leaf) and not isinstance(leaf, nn.Module | type) and id(leaf) not in seen:
                seen.add(id(leaf))
                look_into(list(getattr(leaf, "__dict__", {}).values()))

    look_into(result)
    return found


def _is_cache(value: Any) -> bool:
    return any(
        c.__module__.startswith("transformers.") and c.__name__.endswith("Cache") for c in type(value).__mro__
    )


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode and no gradients inside; every module's own mode afterwards."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in all_tensors(model):
        names[name] = first.setdefault(id(tensor), name)
    return names


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def check_dense_weights(model: nn.Module, caller: str, *, values: bool = True) -> None:
    """ValueError for weights whose zeros cannot be seen or cut: quantised, sharded or lazy ones, and where ``values``
    are read those on the meta device. Kernels and `torch.export` would fail somewhere inside of them."""
    for name, tensor in all_tensors(model):
        kind = type(tensor)
        what = None
        if is_lazy(tensor):
            what = "is not initialised yet: run the model once first"
        elif kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            what = (
                f"is a {kind.__module__}.{kind.__name__}, whose numbers are not in a dense tensor: {_FIRST}"
            )
        elif values and tensor.is_meta:
            what = "is on the device meta and has no values: load the weights first"
        elif tensor.is_quantized:
            what = f"is of the quantised dtype {tensor.dtype}: {_FIRST}"
        elif tensor.layout != torch.strided:
            what = f"has layout {tensor.layout}: pass a model of dense tensors (to_dense())"
        if what is not None:
            raise ValueError(f"{caller}: model: {name} {what}")
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        packed = isinstance(weight, nn.Parameter) and not (weight.is_floating_point() or weight.is_complex())
        quantised = any(".quantized." in f"{c.__module__}." for c in type(module).__mro__)
        if quantised or (packed and isinstance(module, _LAYERS)):
            kind = type(module)
            raise ValueError(
                f"{caller}: model: {path or 'it'} is quantised ({kind.__module__}.{kind.__name__}): {_FIRST}"
            )


def check_no_fake_quantisation(model: nn.Module, caller: str) -> None:
    """ValueError for quantisation-aware training: its observers make every run of the model another function."""
    for path, module in model.named_modules():
        if any("FakeQuant" in c.__name__ for c in type(module).__mro__):
            raise ValueError(
                f"{caller}: model: {path or 'it'} is fake-quantised ({type(module).__name__}): {_FIRST}; for "
                "quantisation-aware training, compact before prepare_qat"
            )


_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_FIRST = "compact before you quantise, shard or otherwise wrap the weights, and do that to the result"


# What torch wraps models in: classes whose inside is not the user's module as it was written.
_WRAPPERS = {
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "OptimizedModule",
    "ScriptModule",
}


def find_wrapper(model: nn.Module, caller: str) -> tuple[str, str] | None:
    """The first wrapper of torch's in a model: its class name, and " at path" for messages. TypeError for no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model: expected an nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                return base.__name__, f" at {path}" if path else ""
    return None


def deep_copy(model: nn.Module) -> nn.Module:
    """`copy.deepcopy`, which by itself refuses a tensor with a graph: one that a forward has kept (a feature, a
    cache) comes along without its graph."""
    kept: dict[int, Any] = {}
    for module in model.modules():
        for value in tree_leaves([vars(module), dict(module.named_buffers(recurse=False))]):
            if isinstance(value, Tensor) and not value.is_leaf:
                kept[id(value)] = value.detach().clone()
    return copy.deepcopy(model, kept)


def copy_without_hooks(model: nn.Module) -> nn.Module:
    """A deep copy with gradients. Hooks that watch (features, timing) stay with the source; those that belong to the
    model come along."""
    result = deep_copy(model)
    for (_, old), (_, new) in zip(model.named_modules(), result.named_modules(), strict=True):
        keep_hooks(new, _is_part_of_the_model)
        copies = dict(new.named_parameters(recurse=False))
        for name, tensor in old.named_parameters(recurse=False):
            if tensor.grad is not None and copies[name].grad is None:
                copies[name].grad = tensor.grad.detach().clone()
    return result


def _is_part_of_the_model(hook: Any) -> bool:
    owner = hook if hasattr(hook, "__qualname__") else type(hook)  # a function, or an object
    where = owner.__module__
    return isinstance(where, str) and where.startswith(_PART_OF_THE_MODEL)
