"""Copies of a model, whatever its forward has left in it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_WATCHING = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# Whose hooks are part of a model: torch.nn.utils computes weights from other parameters in them, transformers collects
# hidden states, for its own decoders too.
_PART_OF_THE_MODEL = ("torch.nn.utils.", "transformers.")


def deep_copy(model: nn.Module) -> nn.Module:
    """`copy.deepcopy`, which by itself refuses a tensor with a graph: one that a forward has kept (a feature, a
    cache) comes along without its graph."""
    kept: dict[int, Any] = {}
    for module in model.modules():
        for value in pytree.tree_leaves([vars(module), module._buffers]):
            if isinstance(value, Tensor) and not value.is_leaf:
                kept[id(value)] = value.detach().clone()
    return copy.deepcopy(model, kept)


def copy_without_hooks(model: nn.Module) -> nn.Module:
    """A deep copy with gradients. Hooks that watch (features, timing) stay with the source; those that belong to the
    model come along."""
    result = deep_copy(model)
    for (_, old), (_, new) in zip(model.named_modules(), result.named_modules(), strict=True):
        for name in (*_WATCHING, "_forward_pre_hooks"):
            hooks = getattr(new, name)
            # The two tables of flags have the keys of `_forward_hooks`, which is cleared first.
            for key, hook in list(hooks.items()):
                gone = (
                    key not in new._forward_hooks
                    if isinstance(hook, bool)
                    else not _is_part_of_the_model(hook)
                )
                if gone:
                    del hooks[key]
        for tensor_name, tensor in old._parameters.items():
            copied = new._parameters[tensor_name]
            if tensor is not None and tensor.grad is not None and copied is not None and copied.grad is None:
                copied.grad = tensor.grad.detach().clone()
    return result


def hooks_of(module: nn.Module) -> list[Any]:
    return [hook for name in (*_WATCHING, "_forward_pre_hooks") for hook in getattr(module, name).values()]


def _is_part_of_the_model(hook: Any) -> bool:
    owner = hook if hasattr(hook, "__qualname__") else type(hook)  # a function, or an object
    where = owner.__module__
    return isinstance(where, str) and where.startswith(_PART_OF_THE_MODEL)
