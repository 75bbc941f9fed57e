"""`Selection`: which channels tell which class, to read, to save, and to carry over to a compacted model and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .capture import chosen_layers

if TYPE_CHECKING:
    from ffr_ext import CompactionPlan, SparsityReport

FORMAT = "ffr_ext.selection"
VERSION = 1


class Entry(NamedTuple):
    """A relevant feature of a class."""

    class_name: str
    layer: str
    channel: int
    weight: float


@dataclass(frozen=True)
class Fit:
    """How well the selected features tell the classes, on the images that they were selected on.

    Attributes:
        images: How many there were.
        residual: ||X W - L||^2 / images; 1 is what weights of zero leave.
        accuracy: Share of images whose largest v . w_j is that of their class (on a sample where 64 MB of vectors
            do not hold all). If it is low, these features do not tell the classes.
        gap: Largest duality gap of a class, as a share of half its number of images.
        iterations: Of the solver.
    """

    images: int
    residual: float
    accuracy: float
    gap: float
    iterations: int


class Survivors(NamedTuple):
    """A layer's filters: how many are dead, how many of its channels are selected, how many are selected and alive
    (None where a report of counts cannot tell)."""

    layer: str
    filters: int
    dead: int
    selected: int
    alive_selected: int | None

    @property
    def alive(self) -> int:
        return self.filters - self.dead


@dataclass(frozen=True, eq=False)
class Selection:
    """The relevant features of each class; made by `select_features`.

    Attributes:
        weights: (Q, classes) float64; row q is a channel, layer after layer.
        layers: Name -> number of channels, in the order of the rows.
        classes: Their names.
        mu, positive: What it was selected with.
        fit: How well it tells the classes.
        producers: Layer -> (name of the weight that makes its channels, the dimension they are).
        skipped: Layer -> constant channels that were left out.
        channel_dim: As given to `select_features`.
    """

    weights: Tensor
    layers: dict[str, int]
    classes: tuple[str, ...]
    mu: float
    positive: bool
    fit: Fit
    producers: dict[str, tuple[str, int]] = field(default_factory=dict)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    channel_dim: int | None = None

    def __repr__(self) -> str:
        chosen = int((self.weights != 0).any(1).sum())
        return (
            f"Selection({chosen} of {len(self.weights)} channels in {len(self.layers)} layers, "
            f"{len(self.classes)} classes, mu={self.mu:g}, accuracy {self.fit.accuracy:.1%})"
        )

    @property
    def entries(self) -> list[Entry]:
        """Class after class, the heaviest first."""
        rows = self._rows()
        found = []
        for j, name in enumerate(self.classes):
            column = self.weights[:, j]
            order = column.nonzero().flatten().tolist()
            order.sort(key=lambda q, column=column: -abs(float(column[q])))  # type: ignore[misc]
            found += [Entry(name, rows[q][0], rows[q][1], float(column[q])) for q in order]
        return found

    def table(self) -> str:
        """The entries, and the fit below them."""
        width = max([5, *(len(entry.layer) for entry in self.entries)])
        names = max([5, *(len(name) for name in self.classes)])
        lines = [f"{'class':<{names}}  {'layer':<{width}}  channel    weight"]
        lines += [
            f"{e.class_name:<{names}}  {e.layer:<{width}}  {e.channel:>7}  {e.weight:>8.4f}"
            for e in self.entries
        ]
        fit = self.fit
        lines.append(
            f"{fit.images} images, accuracy of the selected features {fit.accuracy:.1%}, residual {fit.residual:.3f}"
        )
        return "\n".join(lines)

    def channels(self, layer: str) -> list[int]:
        """The channels of a layer that some class has a weight for, in rising order."""
        return self.weights[self._slice(layer)].ne(0).any(1).nonzero().flatten().tolist()

    def scores(self, vectors: Tensor) -> Tensor:
        """X W (B, classes) of feature vectors; the largest is the class that the features tell."""
        return vectors @ self.weights.to(vectors)

    # --- used by the other modules of this package -----------------------------------------------

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers in another model of the same names."""
        return chosen_layers(model, list(dict.fromkeys(_module_of(name) for name in self.layers)))

    def check_fits(self, widths: Mapping[str, int], caller: str) -> None:
        if dict(widths) != self.layers:
            raise ValueError(
                f"{caller}: selection: it was made with layers and channels {self.layers}, this model gives "
                f"{dict(widths)}; select on this model, or see Selection.in_source"
            )

    def vector(self, energies: Mapping[str, Tensor]) -> Tensor:
        """Energies of each layer's channels to vectors (B, Q), without the skipped channels."""
        from .features import shares

        parts = []
        for name in self.layers:
            kept = torch.ones(self.layers[name], dtype=torch.bool, device=energies[name].device)
            kept[self.skipped.get(name, [])] = False
            parts.append(shares(energies[name], kept))
        return torch.cat(parts, 1)

    def feature(self, row: int) -> tuple[str, int]:
        """Layer and channel of a row of ``weights``."""
        for name, width in self.layers.items():
            if row < width:
                return name, row
            row -= width
        raise IndexError(f"the selection has {len(self.weights)} rows")

    def _rows(self) -> list[tuple[str, int]]:
        return [(name, channel) for name, width in self.layers.items() for channel in range(width)]

    def _slice(self, layer: str) -> slice:
        start = 0
        for name, width in self.layers.items():
            if name == layer:
                return slice(start, start + width)
            start += width
        raise ValueError(f"layer: expected one of {', '.join(map(repr, self.layers))}, got {layer!r}")

    # --- pruning ---------------------------------------------------------------------------------

    def in_source(self, plan: CompactionPlan, weights: Mapping[str, str] | None = None) -> Selection:
        """The same selection with the channel numbers of the model that ``plan`` made this one's model from.

        ``weights`` says for a layer which weight makes its channels; by default the one that ran last in front of it,
        if it has as many filters.
        """
        columns: list[Tensor] = []
        layers: dict[str, int] = {}
        skipped: dict[str, list[int]] = {}
        for name, width in self.layers.items():
            keep, total = self._kept(name, width, plan, weights or {})
            rows = torch.zeros(total, len(self.classes), dtype=self.weights.dtype)
            rows[keep] = self.weights[self._slice(name)]
            columns.append(rows)
            layers[name] = total
            removed = set(range(total)) - set(keep)
            gone = sorted(removed | {keep[channel] for channel in self.skipped.get(name, [])})
            skipped.update({name: gone} if gone else {})
        return replace(self, weights=torch.cat(columns), layers=layers, skipped=skipped)

    def _kept(
        self, layer: str, width: int, plan: CompactionPlan, weights: Mapping[str, str]
    ) -> tuple[list[int], int]:
        """Numbers in the source of a layer's channels, and how many the source has."""
        weight, dim = self.producers.get(layer, ("", 0))
        if layer in weights:
            weight, dim = weights[layer], 0
        if weight not in plan.source:
            why = f"the plan has no tensor {weight!r}" if weight else "which weight makes it is not known"
            raise ValueError(
                f"in_source: layer {layer!r}: {why}; name it: weights={{{layer!r}: '....weight'}}"
            )
        total = plan.source[weight][dim]
        cut = next((cut for cut in plan.cuts.get(weight, []) if cut.dim == dim), None)
        keep = list(range(total)) if cut is None else [int(index) for index in cut.keep or []]
        if len(keep) != width:
            raise ValueError(
                f"in_source: layer {layer!r} has {width} channels, {weight!r} keeps {len(keep)} in this plan; "
                "was the selection made on the model that the plan gives?"
            )
        return keep, total

    def survivors(self, report: SparsityReport, model: nn.Module | None = None) -> list[Survivors]:
        """For each layer whose channels a counted filter makes: dead filters, selected channels, and both.

        ``report`` counts and does not say which filters are dead; the ``model`` that it counted does. Behind an
        addition a channel can be alive while the filter that ran last is dead.
        """
        rows = []
        for name in self.layers:
            weight = self.producers.get(name, ("", 0))[0].removesuffix(".weight")
            layer = next((row for row in report if weight in (row.name, row.norm)), None)
            if layer is None or layer.filters != self.layers[name]:
                continue
            selected = self.channels(name)
            alive: int | None = len(selected) if not layer.zero_filters or not selected else None
            if alive is None and model is not None:
                dead = _dead_filters(model, layer.name, layer.norm, report.threshold)
                alive = sum(channel not in dead for channel in selected)
            rows.append(Survivors(name, layer.filters, layer.zero_filters, len(selected), alive))
        return rows

    # --- JSON ------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything, weights as (row, class, weight); `load` reads it back to the last bit."""
        entries = [[*index, float(self.weights[tuple(index)])] for index in self.weights.nonzero().tolist()]
        content = {
            "format": FORMAT, "version": VERSION, "mu": self.mu, "positive": self.positive,
            "channel_dim": self.channel_dim, "classes": list(self.classes), "layers": self.layers,
            "producers": self.producers, "skipped": self.skipped, "fit": asdict(self.fit), "weights": entries,
        }  # fmt: skip
        return json.dumps(content, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file."""
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(self.to_json() + "\n")
        os.replace(temporary, path)  # a reader never sees half of it

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `save` wrote; ValueError for anything else."""
        with open(path, encoding="utf-8") as file:
            try:
                data = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not a selection: not JSON ({error})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'{path}: not a selection: expected "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ValueError(
                f"{path}: selection of version {data.get('version')!r}, this ffr_ext reads {VERSION}"
            )
        try:
            layers = {str(name): int(width) for name, width in data["layers"].items()}
            weights = torch.zeros(sum(layers.values()), len(data["classes"]), dtype=torch.float64)
            for row, column, weight in data["weights"]:
                weights[row, column] = weight
            return cls(
                weights=weights, layers=layers, classes=tuple(data["classes"]), mu=float(data["mu"]),
                positive=bool(data["positive"]), fit=Fit(**data["fit"]), channel_dim=data["channel_dim"],
                producers={name: (str(w), int(dim)) for name, (w, dim) in data["producers"].items()},
                skipped={name: [int(c) for c in channels] for name, channels in data["skipped"].items()},
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}: damaged selection: {type(error).__name__}: {error}") from None


def _module_of(name: str) -> str:
    """Without the number of the call."""
    return name.split(":")[0]


def _dead_filters(model: nn.Module, layer: str, norm: str | None, threshold: float) -> set[int]:
    """Filters of an effective scale at or below the threshold, as `sparsity` counts them."""
    from ffr_ext import filter_norms

    module = model.get_submodule(layer)
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    if transposed and getattr(module, "groups", 1) > 1:
        raise ValueError(f"survivors: {layer!r} is a grouped transposed convolution, which is not supported")
    with torch.no_grad():
        scale = filter_norms([module.get_parameter("weight")], dim=int(transposed))[0]
        if norm is not None:
            behind = model.get_submodule(norm)
            variance = behind.get_buffer("running_var")
            gamma = behind.get_parameter("weight").abs() if getattr(behind, "affine", True) else 1.0
            through = gamma * (variance / (variance + float(getattr(behind, "eps", 0.0)))).sqrt()
            scale = torch.where(scale == 0, 0.0, through)
    return set((scale <= threshold).nonzero().flatten().tolist())
