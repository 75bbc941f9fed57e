"""Every question that this package puts to torch's private parts, and what holds where a torch has no answer.

No other file uses a private name of torch. `tests/test_torch_private.py` names each function here and runs it with the
private name taken away: an upgrade of torch reads this file and that test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

Function = TypeVar("Function", bound=Callable[..., Any])

# ------------------------------------------------------------------------------------------------------------
# Inputs and outputs of any nesting. torch 2.15 has no public pytree that a model's own output classes are in.
# ------------------------------------------------------------------------------------------------------------


def tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """All leaves of nested tuples, lists, dicts and registered classes, and what `is_leaf` says is one."""
    return _pytree.tree_leaves(tree, is_leaf)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `function(leaf)` in the place of every leaf."""
    return _pytree.tree_map(function, tree)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree_map` for the leaves that are tensors."""
    return _pytree.tree_map_only(Tensor, function, tree)


# ------------------------------------------------------------------------------------------------------------
# Who is computing
# ------------------------------------------------------------------------------------------------------------


def graph_task() -> int:
    """A number for the backward pass that runs on this thread, -1 where none does. Without the question -1: every
    backward pass is then taken for the same, and recomputation for a forward pass."""
    ask = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if ask is None else int(ask())


def transforms_active() -> bool:
    """Whether a torch.func transform runs. Without the question: none does."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return ask is not None and bool(ask())


def constant_when_compiled(function: Function) -> Function:
    """Decorator: torch.compile takes the result for a constant instead of tracing the function. What
    `torch.compiler.assume_constant_result` sets; calling that would import all of Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ------------------------------------------------------------------------------------------------------------
# Tensors and modules
# ------------------------------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written in place; None where torch does not count (inference mode)."""
    try:
        return tensor._version
    except (AttributeError, RuntimeError):
        return None


def traced_version(tensor: Tensor) -> int | None:
    """The same while torch.compile traces, where every tensor is counted."""
    return getattr(tensor, "_version", None)


@constant_when_compiled
def graph_in_work() -> str:
    """Which graph torch.compile is tracing: of a frame, of what follows a graph break in it, or of a layer that is
    compiled by itself. Without the question: always the same."""
    context = getattr(getattr(torch, "_guards", None), "CompileContext", None)
    ask = getattr(context, "current_compile_id", None)
    return "" if ask is None else str(ask())


def unscales_by_itself(optimizer: Any) -> bool:
    """Whether a GradScaler leaves unscaling to the optimizer's step (fused ones). Without the attribute it does not."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks(module: nn.Module) -> list[Any]:
    """The hooks on a module. (Two of the tables hold flags for the keys of another.)"""
    return [hook for table in _tables(module) for hook in table.values() if not isinstance(hook, bool)]


def keep_hooks(module: nn.Module, wanted: Callable[[Any], bool]) -> None:
    """Take all hooks off the module but those that are wanted."""
    tables = list(_tables(module))
    for table in tables:
        for key, hook in list(table.items()):
            if not isinstance(hook, bool) and not wanted(hook):
                for (
                    each
                ) in tables:  # keys are unique over all tables, and the flags have those of their hooks
                    each.pop(key, None)


def _tables(module: nn.Module) -> Iterator[MutableMapping[Any, Any]]:
    for name in _HOOKS:
        table = getattr(module, name, None)
        if isinstance(table, MutableMapping):
            yield table


# ------------------------------------------------------------------------------------------------------------
# Operators of an exported graph
# ------------------------------------------------------------------------------------------------------------


def schema(target: Any) -> Any:
    """The schema of an operator; None for a plain Python function such as `operator.getitem`."""
    return getattr(target, "_schema", None)


def overload_name(target: Any) -> str:
    """ "Tensor" for aten.add.Tensor, "default" where it has no name."""
    name: str = schema(target).overload_name
    return name or "default"


def size_of(dimension: Any, unknown: int) -> int:
    """A dimension of a traced tensor as a number, with `unknown` for every size in it that depends on values (as that
    of `nonzero`). Without the expression: `unknown` for the whole."""
    if isinstance(dimension, int):
        return dimension
    expression = getattr(getattr(dimension, "node", None), "expr", None)
    symbols = getattr(expression, "free_symbols", None)
    if expression is None or symbols is None:
        return unknown
    return int(expression.subs(dict.fromkeys(symbols, unknown)))


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """Inside, `nn.TransformerEncoder` and its like do not compare a mask with the causal one, which no trace can. They
    do it to choose a faster kernel. Without the function nothing is done."""
    name, module = "_detect_is_causal_mask", nn.modules.transformer
    detect = getattr(module, name, None)
    if detect is None:
        yield
        return
    setattr(module, name, lambda mask, is_causal=None, size=None: is_causal is True)
    try:
        yield
    finally:
        setattr(module, name, detect)


class AssumeRows(TorchFunctionMode):
    """Inside, a traced tensor whose size depends on values is taken to have at least one row, so that a forward that
    skips what nothing is sent to can be traced; and a loop over the places where a mask of one dimension is true goes
    over all of them. Without the means to say so nothing is assumed."""

    def __init__(self) -> None:
        super().__init__()
        self._places: list[tuple[Tensor, int]] = []  # what nonzero gave -> the length of its mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.unbind and (length := self._length(args[0])) is not None:  # what `for` calls
            return tuple(torch.tensor([place], device=args[0].device) for place in range(length))
        if func is Tensor.__format__ and args[0].dim() == 0:  # f"expert_{place}": a traced one has no number
            return format(args[0].item(), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.nonzero, torch.nonzero) and args and isinstance(result, Tensor):
            length = args[0].shape[0] if args[0].dim() == 1 else None
            if isinstance(length, int) and not isinstance(result.shape[0], int):
                self._places.append((result, length))
        check = getattr(torch, "_check", None)
        if check is not None:
            for leaf in tree_leaves(result):
                for size in leaf.shape if isinstance(leaf, Tensor) else ():
                    if not isinstance(size, int):
                        check(size > 0)
        return result

    def _length(self, tensor: Tensor) -> int | None:
        return next((length for places, length in self._places if places is tensor), None)
