"""The chain of layers at one end of a network: which modules it is, how it runs, and what is no chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ChainSpec = nn.Module | str | Sequence["nn.Module | str"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
RESHAPES = (nn.Flatten, nn.Unflatten)
SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Element by element only: the mirror applies them to what has the same shape.
ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_KNOWN = (*WEIGHTED, *RESHAPES, *SKIPPED, *ACTIVATIONS)
_LISTS = (nn.Sequential, nn.ModuleList)
# Their forward is not that of the modules in them, or cannot be taken apart.
_WRAPPERS = {
    "OptimizedModule": "is compiled; pass the module it was compiled from (compiled._orig_mod)",
    "DataParallel": "runs replicas in threads; use DistributedDataParallel",
}


@dataclass(frozen=True)
class Layer:
    """One module of a chain, under the name by which messages call it."""

    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})" if self.name else type(self.module).__name__


@dataclass(frozen=True)
class Chain:
    """Modules in call order. ``argument`` is where the user gave them, ``"first"`` or ``"last"``."""

    argument: str
    layers: tuple[Layer, ...]

    @property
    def weighted(self) -> list[Layer]:
        """The layers with a weight that a mirror transposes."""
        return [layer for layer in self.layers if isinstance(layer.module, WEIGHTED)]

    @property
    def lead(self) -> int:
        """How many modules come before the first that is no activation, dropout or reshape."""
        light = (*ACTIVATIONS, *SKIPPED, *RESHAPES)
        for index, layer in enumerate(self.layers):  # Dynamo of torch 2.10 traces no takewhile
            if not isinstance(layer.module, light):
                return index
        return len(self.layers)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all modules, each once."""
        seen: set[nn.Parameter] = set()
        for layer in self.layers:
            for parameter in layer.module.parameters():
                if parameter not in seen:
                    seen.add(parameter)
                    yield parameter

    def check_end(self, tensor: Tensor, called: str) -> None:
        """ValueError unless the outer end of the chain, the front of ``first`` and the back of ``last``, has the
        width of ``tensor``; a reshape there leaves it to the run."""
        front = self.argument == "first"
        outer = self.layers if front else self.layers[::-1]
        found = next((layer for layer in outer if isinstance(layer.module, (*RESHAPES, *WEIGHTED))), None)
        if found is not None and isinstance(found.module, WEIGHTED):
            check_width(found, tensor, called, taken=front)

    def without_leading_activation(self) -> Chain:
        """What reads a code: the activation in front has been applied to it."""
        kept = [
            layer
            for index, layer in enumerate(self.layers)
            if index >= self.lead or not isinstance(layer.module, ACTIVATIONS)
        ]
        return Chain(self.argument, tuple(kept))

    def run(self, hidden: Tensor, called: str) -> tuple[Tensor, list[tuple[int, ...]]]:
        """The output, and the shape that each module was given. ``called``: what messages call ``hidden``."""
        shapes = []
        for layer in self.layers:
            shapes.append(tuple(hidden.shape))
            if isinstance(layer.module, WEIGHTED):
                check_width(layer, hidden, called, taken=True)
            hidden = forward(layer.module, hidden)
        return hidden, shapes


def forward(module: nn.Module, hidden: Tensor) -> Tensor:
    """The module's output, without its hooks (a FeatureFlow would take the call for one of the model's) and
    without writing to what it is given."""
    if getattr(module, "inplace", False):
        hidden = hidden.clone()
    result: Tensor = module.forward(hidden)
    return result


def widths(module: nn.Module) -> tuple[int, int]:
    """What a layer with a weight takes and gives: features of a linear layer, channels of a convolution."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return module.in_channels, module.out_channels


def spatial_dims(module: nn.Module) -> int:
    """0 of a linear layer, 1 to 3 of a convolution."""
    return 0 if isinstance(module, nn.Linear) else module.weight.dim() - 2  # type: ignore[operator]


def check_width(layer: Layer, hidden: Tensor, called: str, *, taken: bool) -> None:
    """ValueError unless ``hidden`` has the width that the layer takes, or gives where ``taken`` is False."""
    expected = widths(layer.module)[0 if taken else 1]
    dims = spatial_dims(layer.module)
    axis = -1 if dims == 0 else 1
    right_rank = hidden.dim() >= 2 if dims == 0 else hidden.dim() == dims + 2
    if right_rank and hidden.shape[axis] == expected:
        return
    sizes = (
        f"(B, ..., {expected})" if dims == 0 else f"(B, {expected}, {', '.join('...' for _ in range(dims))})"
    )
    verb = "takes" if taken else "gives"
    raise ValueError(
        f"{called}: {layer} {verb} tensors of shape {sizes}, got {tuple(hidden.shape)} there; is {called} of "
        "another width?"
    )


def find_chain(model: nn.Module, argument: str, spec: ChainSpec, *, mirrored: bool) -> Chain:
    """The leaves of what the user gave, checked.

    ``mirrored``: whether the mirror is ours, so that every module must be one that has a mirror.

    Raises:
        TypeError: no module, name or list of them.
        ValueError: not of the model, compiled or scripted, without a weight, no chain, or not to be mirrored.
    """
    by_name = dict(model.named_modules())
    layers = tuple(_leaves(argument, spec, by_name, {m: name for name, m in by_name.items()}))
    chain = Chain(argument, layers)
    for layer in layers:
        check_plain(f"{argument}: {layer}", layer.module)
        if mirrored:
            _check_mirrored(argument, layer)
    if not (chain.weighted if mirrored else any(True for _ in chain.parameters())):
        raise ValueError(f"{argument}: expected layers with weights, got {_listed(layers) or 'none'}")
    if mirrored:
        _check_neighbours(chain)
    return chain


def check_plain(called: str, module: nn.Module) -> None:
    """ValueError for a compiled, scripted or replicated module."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{called} is scripted; pass the module it was scripted from")
    if type(module).__name__ in _WRAPPERS:
        raise ValueError(f"{called} {_WRAPPERS[type(module).__name__]}")


def check_apart(model: nn.Module, first: Chain, last: Chain) -> None:
    """ValueError unless the two chains share nothing and leave a layer between their codes."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    inner = {module for layer in first.layers for module in layer.module.modules() if _has_parameters(module)}
    for layer in last.layers:
        if not inner.isdisjoint(layer.module.modules()):
            raise ValueError(f"first, last: expected parts that do not overlap, got {layer} in both")
    shared = [p for p in last.parameters() if p in set(first.parameters())]
    if shared:
        names = ", ".join(name_of.get(p, "?") for p in shared)
        raise ValueError(f"first, last: expected no shared parameters, got {names} in both")
    if not set(model.parameters()) - set(first.parameters()) - set(last.parameters()):
        raise ValueError(
            "first, last: expected at least one layer with weights between the two codes (a + b < K), but all "
            "parameters of the model are in first or last"
        )


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _leaves(
    argument: str, spec: object, by_name: dict[str, nn.Module], name_of: dict[nn.Module, str]
) -> Iterator[Layer]:
    if isinstance(spec, str):
        if spec not in by_name:
            raise ValueError(f"{argument}: the model has no module named {spec!r}")
        spec = by_name[spec]
    if isinstance(spec, _LISTS) and type(spec).forward in (nn.Sequential.forward, nn.ModuleList.forward):
        spec = list(spec)
    if isinstance(spec, nn.Module):
        check_plain(f"{argument}: {type(spec).__name__}", spec)
        if spec not in name_of:
            raise ValueError(f"{argument}: this {type(spec).__name__} is not a module of the model")
        yield Layer(name_of[spec], spec)
    elif isinstance(spec, (list, tuple)):
        for part in spec:
            yield from _leaves(argument, part, by_name, name_of)
    else:
        raise TypeError(
            f"{argument}: expected a module, a slice of a Sequential, or a list of modules and names, got "
            f"{type(spec).__name__}"
        )


def _check_mirrored(argument: str, layer: Layer) -> None:
    module = layer.module
    kind = next((known for known in _KNOWN if isinstance(module, known)), None)
    if kind is None or type(module).forward is not kind.forward:
        raise ValueError(f"{argument}: {layer} cannot be mirrored; pass mirror=<your module>")
    if isinstance(module, WEIGHTED):
        _check_weight(argument, layer)
        mode = getattr(module, "padding_mode", "zeros")
        if mode != "zeros":
            raise ValueError(
                f"{argument}: {layer} with padding_mode={mode!r} cannot be mirrored; pass mirror=<your module>"
            )


def _check_weight(argument: str, layer: Layer) -> None:
    own = dict(layer.module.named_parameters(recurse=False))
    if "weight" not in own:
        raise ValueError(
            f"{argument}: the weight of {layer} is no parameter but computed (weight_norm, a parametrization, a "
            "pruning mask), so it cannot be mirrored; make it one first (remove_weight_norm, "
            "remove_parametrizations, prune.remove)"
        )
    if is_lazy(own["weight"]):
        raise ValueError(f"{argument}: the weight of {layer} has no shape yet; run the model once first")


def _check_neighbours(chain: Chain) -> None:
    """Widths fit from layer to layer where only elementwise modules are between, and no layer is there twice."""
    weighted = chain.weighted
    if len({layer.module for layer in weighted}) < len(weighted) or _shares(weighted):
        raise ValueError(
            f"{chain.argument}: expected every weight once, got one twice in {_listed(chain.layers)}"
        )
    before: Layer | None = None
    for layer in chain.layers:
        if isinstance(layer.module, RESHAPES):
            before = None
        if not isinstance(layer.module, WEIGHTED):
            continue
        if before is not None and widths(before.module)[1] != widths(layer.module)[0]:
            raise ValueError(
                f"{chain.argument}: expected a chain in call order, but {before} gives {widths(before.module)[1]} "
                f"and {layer} takes {widths(layer.module)[0]}"
            )
        before = layer


def _shares(layers: Sequence[Layer]) -> bool:
    return len({layer.module.weight for layer in layers}) < len(layers)


def _listed(layers: Sequence[Layer]) -> str:
    return ", ".join(map(str, layers))
