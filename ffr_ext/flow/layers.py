"""Which modules of a network are the points of its feature flow."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

LayerSpec = (
    str
    | Sequence["str | nn.Module"]
    | Sequence[Sequence["str | nn.Module"]]
    | Callable[[str, nn.Module], bool]
)
Layers = dict[str, nn.Module]

# These only hold other modules: the four stages of a ResNet are four nn.Sequential under one parent, and
# are not blocks.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    cls
    for name in torch.nn.modules.activation.__all__
    if issubclass(cls := getattr(torch.nn.modules.activation, name), nn.Module)
    and cls not in _NOT_ELEMENTWISE
)


def select_streams(model: nn.Module, layers: LayerSpec, join_stages: bool = False) -> list[Layers]:
    """The layers that ``layers`` means, in streams: those of one stream make a path, and no term compares two streams.

    ``"auto"`` puts the blocks of different parents into streams of their own (:func:`streams`), a sequence of sequences
    says it by hand, and anything else is one stream. See :func:`select_layers` for the rest.
    """
    if isinstance(layers, str) and layers == "auto":
        return streams(model, select_layers(model, layers), join_stages)
    if _is_nested(layers):
        return _by_hand(model, layers)
    return [select_layers(model, layers)]


def _is_nested(layers: Any) -> bool:
    return isinstance(layers, (list, tuple)) and any(
        isinstance(entry, Iterable) and not isinstance(entry, (str, nn.Module)) for entry in layers
    )


def _by_hand(model: nn.Module, layers: Any) -> list[Layers]:
    result: list[Layers] = []
    listed: set[str] = set()
    for index, path in enumerate(layers):
        if isinstance(path, (str, nn.Module)) or not isinstance(path, Iterable):
            raise TypeError(
                f"layers[{index}]: expected a list of names and modules, as the other paths are, got "
                f"{type(path).__name__}"
            )
        try:
            chosen = _by_name_or_identity(model, path)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layers[{index}]: {error}") from error
        for name in chosen:
            if name in listed:
                raise ValueError(f"layers[{index}]: {name!r} is listed twice; a layer belongs to one path")
        listed.update(chosen)
        result.append(chosen)
    return result


def streams(model: nn.Module, chosen: Layers, join_stages: bool = False) -> list[Layers]:
    """The chosen layers, apart where they are in different parents that hold two or more of them: encoder and decoder,
    two towers, the way down and the way up of a U-net.

    What lies next to each other and is alone in its parent goes with its neighbours, as do the children of one parent,
    unless they are numbered in groups (``down1, down2, up1, up2``). With ``join_stages`` lists of layers and modules
    that are called stages stay in one stream with what lies around them: terms between stages are wanted then, and
    `transition="pool"` maps them onto each other.
    """
    modules = set(chosen.values())
    count = {module: len(modules.intersection(module.modules())) for module in model.modules()}
    order = {module: name for name, module in chosen.items()}
    result: list[Layers] = []
    placed: set[nn.Module] = set()

    def walk(parent: nn.Module, stream: Layers) -> Layers:
        """Sort what is in `parent` into `stream` and new ones; returns the stream that goes on behind it."""
        children = [(name, child) for name, child in parent.named_children() if count[child]]
        starts = set() if join_stages else _group_starts([name for name, _ in children])
        for number, (_, child) in enumerate(children):
            if number in starts:
                stream = _opened(result)
            if child in modules:
                if child not in placed:  # it may have two parents
                    stream[order[child]] = child
                    placed.add(child)
            elif count[child] == 1 or (join_stages and _is_a_stage(parent, child)):
                stream = walk(child, stream)
            else:
                walk(child, _opened(result))
                stream = _opened(result)
        return stream

    walk(model, _opened(result))
    return [stream for stream in result if stream]


def _opened(result: list[Layers]) -> Layers:
    result.append({})
    return result[-1]


def _is_a_stage(parent: nn.Module, child: nn.Module) -> bool:
    """Whether a child with several layers goes on where the one before it in its parent ended."""
    in_a_list = isinstance(parent, (nn.Sequential, nn.ModuleList))
    return in_a_list or isinstance(child, (nn.Sequential, nn.ModuleList)) or _is_called_stage(child)


def _group_starts(names: list[str]) -> set[int]:
    """Where among the names of children a numbered group of two or more follows another: at ``up1`` of ``down1, down2,
    up1, up2``."""
    starts: set[int] = set()
    first, before = 0, 0
    for stem, group in itertools.groupby(names, _stem):
        size = len(list(group))
        if stem and size > 1:
            if before:
                starts.add(first)
            before = size
        first += size
    return starts


def _stem(name: str) -> str:
    """What stands before the number in a name; nothing if it has none."""
    match = re.match(r"(\D+)\d", name)
    return match[1] if match else ""


def select_layers(model: nn.Module, layers: LayerSpec) -> Layers:
    """Map qualified names to the modules that ``layers`` means, in the order of ``model.named_modules()``.

    ``layers`` is ``"auto"`` (see :func:`repeated_blocks`, then :func:`activations`), one name, a sequence
    of names and modules, or a predicate called with ``(name, module)`` for every module below ``model``.

    Raises:
        ValueError: a name or a module that is not in ``model``, one given twice, or nothing selected.
        TypeError: ``layers`` is none of the above.
    """
    if isinstance(layers, str) and layers == "auto":
        chosen = repeated_blocks(model) or activations(model)
        if not chosen:
            raise ValueError(
                f"layers='auto' found neither repeated blocks nor activation modules in {type(model).__name__}; pass "
                "names, modules, or a predicate (name, module) -> bool"
            )
        return chosen
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, nn.Module) and not isinstance(layers, (nn.Sequential, nn.ModuleList)):
        raise TypeError(
            f"layers: expected 'auto', names, modules or a predicate, got one {type(layers).__name__}; "
            "wrap a single module in a list"
        )
    if isinstance(layers, type):
        raise TypeError(
            f"layers: expected 'auto', names, modules or a predicate, got the class {layers.__name__}; for all "
            f"modules of it pass lambda name, module: isinstance(module, {layers.__name__})"
        )
    if callable(layers) and not isinstance(layers, nn.Module):
        _check_predicate(layers)
        chosen = {name: module for name, module in model.named_modules() if name and layers(name, module)}
        if not chosen:
            raise ValueError(f"layers: the predicate chose none of the modules of {type(model).__name__}")
        return chosen
    if not isinstance(layers, Iterable):
        raise TypeError(
            f"layers: expected 'auto', names, modules or a predicate, got {type(layers).__name__}"
        )
    return _by_name_or_identity(model, layers)  # type: ignore[arg-type]


def _check_predicate(predicate: Callable[..., bool]) -> None:
    """TypeError if it cannot be called with a name and a module."""
    try:
        signature = inspect.signature(predicate)
    except (TypeError, ValueError):  # some callables made in C have none
        return
    try:
        signature.bind("", None)
    except TypeError as error:
        raise TypeError(
            f"layers: expected a predicate (name, module) -> bool, got one with {signature}"
        ) from error


def _by_name_or_identity(model: nn.Module, layers: Iterable[str | nn.Module]) -> Layers:
    by_name = dict(model.named_modules())
    name_of = {module: name for name, module in by_name.items()}
    wanted: set[str] = set()
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Module):
            if layer not in name_of:
                raise ValueError(f"layers[{index}]: this {type(layer).__name__} is not a module of the model")
            name = name_of[layer]
        elif isinstance(layer, str):
            name = layer
            if name not in by_name:
                raise ValueError(
                    f"layers[{index}]: the model has no module named {name!r}{_hint(name, by_name)}"
                )
        else:
            raise TypeError(f"layers[{index}]: expected a name or a module, got {type(layer).__name__}")
        if name in wanted:
            raise ValueError(
                f"layers[{index}]: {name!r} is listed twice; a layer is captured at every call anyway"
            )
        wanted.add(name)
    if not wanted:
        raise ValueError("layers: expected at least one layer, got an empty sequence")
    return {name: module for name, module in by_name.items() if name in wanted}


def _hint(name: str, by_name: dict[str, nn.Module]) -> str:
    close = [known for known in by_name if known.endswith(f".{name}") or name.endswith(f".{known}")]
    return f"; did you mean {close[0]!r}?" if close and close[0] else ""


def repeated_blocks(model: nn.Module) -> Layers:
    """Blocks such as residual blocks and transformer layers, outermost first.

    A class is a block class if some parent has two or more children of it that have children of their own and weights
    of two or more dimensions, and it is no mere container (``nn.Sequential``, ``nn.ModuleList``, ``nn.ModuleDict``),
    no stage, and no part. All modules of a block class are chosen, wherever they are, except inside another block: the
    attention modules of a transformer layer are not blocks.

    A stage is a module whose class is called so (``ResNetStage``, as in transformers and timm), or one that repeats and
    in one of whose siblings containers hold two or more blocks of one class. Stages repeat too, but their features
    rarely have one shape, and what they hold counts as if it were in one container: some hold a single block.

    A part is a class that other blocks are made of, with a single weight that mixes channels, such as a convolution
    with its norm and activation. Stems and transitions are made of it too.

    Auxiliary classifiers (``aux1`` and ``aux2`` of GoogLeNet) repeat, and no path leads from one to the next.
    """
    hold_runs = {type(module) for module in model.modules() if _holds_a_run(module)}
    classes: set[type] = set()

    def without_stages(modules: list[nn.Module], may_be_stages: bool = True) -> Iterator[nn.Module]:
        siblings = Counter(type(module) for module in modules)
        for module in modules:
            repeated = may_be_stages and siblings[type(module)] > 1
            if _is_called_stage(module) or (repeated and type(module) in hold_runs):
                yield from without_stages(_held(module), may_be_stages=False)
            elif not isinstance(module, _CONTAINERS):
                yield module

    def find(module: nn.Module) -> None:
        blocks = without_stages([child for name, child in module.named_children() if not _is_auxiliary(name)])
        counts = Counter(type(block) for block in blocks if _has_inside(block))
        classes.update(cls for cls, count in counts.items() if count > 1)
        for child in module.children():
            if type(child) not in classes:
                find(child)

    find(model)
    classes -= _parts(model, classes)
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        elsewhere = any(name.startswith(f"{outer}.") for outer in chosen) or _is_auxiliary(name)
        if name and type(module) in classes and not elsewhere:
            chosen[name] = module
    return chosen


def _is_auxiliary(path: str) -> bool:
    return any(name.lower().startswith("aux") for name in path.split("."))


def _holds_a_run(module: nn.Module) -> bool:
    held = Counter(type(inner) for inner in _in_containers(module) if _mixes_twice(inner))
    return not isinstance(module, _CONTAINERS) and max(held.values(), default=0) > 1


def _mixes_twice(module: nn.Module) -> bool:
    """Whether it has two weights that mix channels; one, with a norm or a depthwise convolution, is a part of
    blocks as often as a block."""
    mixing = [p for p in module.parameters() if p.dim() == 2 or (p.dim() > 2 and p.shape[1] > 1)]
    return _has_inside(module) and len(mixing) > 1


def _is_called_stage(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Stage") and bool(_held(module))


def _held(stage: nn.Module) -> list[nn.Module]:
    """The modules with children in the containers of a stage, or among its own children if it has none there."""
    inside = [held for held in _in_containers(stage) if _has_inside(held)]
    return inside or [m for m in stage.children() if _has_inside(m) and not isinstance(m, _CONTAINERS)]


def _parts(model: nn.Module, classes: set[type]) -> set[type]:
    return {
        type(inner)
        for block in model.modules()
        if type(block) in classes
        for inner in block.modules()
        if type(inner) in classes and type(inner) is not type(block) and not _mixes_twice(inner)
    }


def _in_containers(module: nn.Module) -> Iterator[nn.Module]:
    """What the containers of a module hold, however deep they are nested."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from (inner for inner in child.children() if not isinstance(inner, _CONTAINERS))
            yield from _in_containers(child)


def _has_inside(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(p.dim() > 1 for p in module.parameters())


def activations(model: nn.Module) -> Layers:
    """The element-wise activation modules (``nn.ReLU``, ``nn.GELU``, ...). A function such as ``F.relu``
    is no module."""
    return {
        name: module for name, module in model.named_modules() if name and isinstance(module, _ACTIVATIONS)
    }
