"""`sparsity`: how many weights and filters of a model are zero, or as good as."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import as_call, check_dense_weights
from .measure import count_parameters, flop_counter
from .scale import effective_scales, find_layers, small_filters, without_repeats


@dataclass(frozen=True)
class LayerSparsity:
    """The counts of one layer, or of all (``kind`` "total").

    Attributes:
        name: Path of the layer in the model.
        kind: Class of the layer, such as ``"Conv2d"``.
        weights, zero_weights: Elements of ``weight``, and those that are exactly 0.
        filters, zero_filters: Filters (output channels, output features), and those of an effective scale at
            or below the threshold.
        parameters: Weights, biases and those of the batch norm behind the layer; for the total those of the
            model.
        flops: Of one forward pass on the example inputs; None without them.
        norm: Path of the batch norm that the effective scale is read from; None where it is the filter's L2
            norm.
    """

    name: str
    kind: str
    weights: int
    zero_weights: int
    filters: int
    zero_filters: int
    parameters: int
    flops: int | None = None
    norm: str | None = None

    @property
    def weight_sparsity(self) -> float:
        """Share of the weights that are 0."""
        return self.zero_weights / self.weights if self.weights else 0.0

    @property
    def filter_sparsity(self) -> float:
        """Share of the filters that are dead."""
        return self.zero_filters / self.filters if self.filters else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsity` counted: ``str()`` is a table, ``layers`` and ``total`` are the data, ``report[name]``
    is a layer."""

    threshold: float
    layers: tuple[LayerSparsity, ...]
    total: LayerSparsity

    @property
    def weights(self) -> int:
        return self.total.weights

    @property
    def zero_weights(self) -> int:
        return self.total.zero_weights

    @property
    def filters(self) -> int:
        return self.total.filters

    @property
    def zero_filters(self) -> int:
        return self.total.zero_filters

    def __iter__(self) -> Iterator[LayerSparsity]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerSparsity:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "threshold": self.threshold,
            "layers": [asdict(layer) for layer in self.layers],
            "total": asdict(self.total),
        }

    def __str__(self) -> str:
        rows = [*self.layers, self.total]
        width = max(len("layer"), *(len(row.name) for row in rows))
        flops = self.total.flops is not None
        head = f"{'layer':<{width}}  {'kind':<15}{'filters':>9}{'zero':>8}{'':>8}{'weights':>13}{'zero':>13}"
        lines = [head + f"{'':>8}{'parameters':>13}" + (f"{'FLOPs':>17}" if flops else "")]
        for row in rows:
            line = f"{row.name:<{width}}  {row.kind:<15}{row.filters:>9,}{row.zero_filters:>8,}"
            line += f"{row.filter_sparsity:>8.1%}{row.weights:>13,}{row.zero_weights:>13,}"
            line += f"{row.weight_sparsity:>8.1%}{row.parameters:>13,}"
            lines.append(line + (f"{row.flops or 0:>17,}" if flops else ""))
        lines.append(f"zero filters: effective scale at or below {self.threshold:g}")
        return "\n".join(lines)


def sparsity(model: nn.Module, threshold: float = 0.0, *, example_inputs: Any = None) -> SparsityReport:
    """Count the weights and filters of every convolution and linear layer that are zero.

    A filter counts as zero if its effective scale is at or below ``threshold``: behind a batch norm
    ``|gamma| sqrt(var / (var + eps))``, else its L2 norm; filters of zeros have scale 0. The filters of a weight that
    layers share, and a gamma that they share, count where that holds in each of them. `zero_small_filters` with the
    same threshold zeroes exactly these.

    Args:
        model: Any module. Nothing is run without ``example_inputs``, and nothing is changed.
        threshold: A finite number of at least 0.
        example_inputs: A tensor, a tuple or a dict: adds FLOPs (``torch.utils.flop_counter``), and finds the
            batch norm behind each layer from the exported graph instead of the order of the modules.

    Returns:
        `SparsityReport`. Shared layers count once, and so do, in the total, shared weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_dense_weights(model, "sparsity")
    threshold = check_threshold(threshold)
    layers = find_layers(model, example_inputs)
    flops = None if example_inputs is None else _flops_by_module(model, example_inputs)
    counted = []
    small = [s.filters for s in small_filters(layers, effective_scales(layers), threshold)]
    for layer, mask in zip(layers, small, strict=True):
        members = [layer.module, *([layer.norm] if layer.norm is not None else [])]
        counted.append(
            LayerSparsity(
                name=layer.name,
                kind=type(layer.module).__name__,
                weights=layer.weight.numel(),
                zero_weights=int((layer.weight == 0).sum()),
                filters=layer.filters,
                zero_filters=int(mask.sum()),
                parameters=sum(p.numel() for m in members for p in m.parameters(recurse=False)),
                flops=None if flops is None else flops.get(layer.name, 0),
                norm=layer.norm_name,
            )
        )
    weights = [layer.weight for layer in layers]  # they live at once, so that no two have one address
    first = {id(weight): row for weight, row in zip(reversed(weights), reversed(counted), strict=True)}
    filters, zero_filters = (
        sum(int(mask.sum()) for mask in without_repeats(layers, masks))
        for masks in ([torch.ones(mask.shape, dtype=torch.bool, device="cpu") for mask in small], small)
    )
    total = LayerSparsity(
        name="total",
        kind=f"{len(counted)} layers",
        weights=sum(c.weights for c in first.values()),
        zero_weights=sum(c.zero_weights for c in first.values()),
        filters=filters,
        zero_filters=zero_filters,
        parameters=count_parameters(model),
        flops=None if flops is None else flops[""],
    )
    return SparsityReport(threshold, tuple(counted), total)


def check_threshold(threshold: Any, hint: str = "") -> float:
    """The threshold as a float: anything that is one number. True is none: it would zero most filters."""
    try:
        if isinstance(threshold, bool | str):
            raise TypeError
        number = float(threshold.item() if isinstance(threshold, Tensor) else threshold)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"threshold: expected a number, got {type(threshold).__name__}{hint}") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"threshold: expected a finite number of at least 0, got {threshold}")
    return number


def _flops_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    counter = flop_counter(model, *as_call(example_inputs))
    prefix = f"{type(model).__name__}."
    result = {"": int(counter.get_total_flops())}
    for name, per_op in counter.get_flop_counts().items():
        result[name.removeprefix(prefix)] = int(sum(per_op.values()))
    return result
