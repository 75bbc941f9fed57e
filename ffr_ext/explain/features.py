"""Feature vectors, and `select_features`: one pass over a loader that keeps sums, no maps and no vectors."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, overload

import torch
from torch import Tensor, nn

from ffr_ext.checks import check_choice

from .capture import (
    Layers,
    Producers,
    Take,
    batches,
    channel_dim_of,
    check_can_repeat,
    check_model,
    chosen_layers,
    first_tensor,
)
from .lasso import Solution, mu_lasso
from .selection import Fit, Selection

TARGETS = ("labels", "predictions")
_NO_WEIGHT = 1e-6  # as a share of the class's largest weight
_SAMPLE_BYTES = 64 << 20  # of the vectors on which the accuracy of the fit is measured


def channel_energies(feature: Tensor, dim: int) -> Tensor:
    """Sum of squares of each channel (B, C), in float64 where the device has it."""
    others = [d for d in range(1, feature.dim()) if d != dim]
    dtype = torch.float32 if feature.device.type == "mps" else torch.float64
    feature = feature.detach()
    if not others:
        return feature.to(dtype).square()
    return torch.linalg.vector_norm(feature, 2, others, dtype=dtype).square()


def shares(energies: Tensor, kept: Tensor | None = None) -> Tensor:
    """Each channel's share of its layer's sum; zeros where that is zero. Channels that are not ``kept`` count as 0."""
    if kept is not None:
        energies = energies * kept.to(energies)
    total = energies.sum(1, keepdim=True)
    return torch.where(total > 0, energies / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def feature_vectors(model: nn.Module, x: Tensor, selection: Selection) -> Tensor:
    """The vectors (B, Q) of images for the layers of a selection: v_pq = ||f_pq||^2 / sum_q ||f_pq||^2.

    ``selection.scores(vectors).argmax(1)`` is the class that the selected features tell.
    """
    check_model(model, "feature_vectors")
    found: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module, feature: Tensor) -> None:
        found[name] = channel_energies(feature, channel_dim_of(model, feature, selection.channel_dim))

    with torch.no_grad(), Layers(model, selection.modules(model), take) as run:
        run(x)
    selection.check_fits({name: energies.shape[1] for name, energies in found.items()}, "feature_vectors")
    return selection.vector(found)


class _Pass:
    """Runs the model over a loader and checks that every batch gives the same layers and channels."""

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Module], targets: str, channel_dim: int | None
    ) -> None:
        self.model, self.layers, self.targets, self.channel_dim = model, layers, targets, channel_dim
        self.found: dict[str, Tensor] = {}
        self.widths: dict[str, int] = {}
        self.producers: dict[str, tuple[str, int]] = {}
        self.extremes: dict[str, tuple[Tensor, Tensor]] = {}  # smallest and largest value of each channel
        self.watch: Producers | None = None
        self.classes = 0

    def varying(self, loader: Any) -> dict[str, Tensor]:
        """A pass of its own: which channels of each layer are not one constant on all images."""
        check_can_repeat(loader, "select_features(skip_constant=True)")
        with closing(self._run(loader, self._extremes)) as runs:
            for _ in runs:
                pass
        return {name: low < high for name, (low, high) in self.extremes.items()}

    def energies(self, loader: Any) -> Generator[tuple[dict[str, Tensor], Tensor], None, None]:
        """For each batch the energies of each layer's channels, and the class of each image."""
        self.watch = Producers(self.model)
        try:
            with closing(self._run(loader, self._take)) as runs:
                for number, (output, labels, count) in enumerate(runs):
                    yield self.found, self._classes(number, output, labels, count)
        finally:
            self.watch.remove()

    def _run(self, loader: Any, take: Take) -> Generator[tuple[Any, Tensor | None, int], None, None]:
        # Closed by those who use it: an exception keeps a generator alive, and with it the hooks on the model.
        with torch.no_grad(), Layers(self.model, self.layers, take) as run:
            for number, (images, labels) in enumerate(batches(loader, self.model, "select_features")):
                self.found = {}
                output = run(images)
                self._check(number)
                yield output, labels, len(images)

    def _take(self, name: str, module: nn.Module, feature: Tensor) -> None:
        dim = channel_dim_of(self.model, feature, self.channel_dim)
        self.found[name] = channel_energies(feature, dim)
        producer = self.watch.of(feature.shape[dim]) if self.watch is not None else None
        if producer is not None:
            self.producers[name] = producer

    def _extremes(self, name: str, module: nn.Module, feature: Tensor) -> None:
        dim = channel_dim_of(self.model, feature, self.channel_dim)
        others = [d for d in range(feature.dim()) if d != dim]
        low, high = feature.amin(others), feature.amax(others)
        if name in self.extremes and self.extremes[name][0].shape == low.shape:
            low = torch.minimum(low, self.extremes[name][0])
            high = torch.maximum(high, self.extremes[name][1])
        self.extremes[name] = (low, high)
        self.found[name] = low[None].double()

    def _check(self, number: int) -> None:
        widths = {name: energies.shape[1] for name, energies in self.found.items()}
        missing = [name for name in self.layers if name not in widths]
        if missing:
            raise ValueError(f"layers: {missing[0]!r} was not called by the model's forward")
        if self.widths and widths != self.widths:
            raise ValueError(
                f"layers: batch {number} gave channels {widths}, the first one {self.widths}; every image needs the "
                "same ones (channel_dim= says where they are)"
            )
        self.widths = widths
        for name, energies in self.found.items():
            if not bool(energies.isfinite().all()):
                raise ValueError(f"layers: {name!r} is NaN or infinite on batch {number}")

    def _classes(self, number: int, output: Any, labels: Tensor | None, count: int) -> Tensor:
        logits = first_tensor(output)
        if logits is not None and logits.dim() == 2:
            self.classes = logits.shape[1]
        if self.targets == "predictions":
            if logits is None or logits.dim() != 2:
                raise ValueError("targets='predictions': expected a model that returns logits (B, classes)")
            return logits.argmax(1)
        if labels is None:
            raise ValueError(
                f"loader: batch {number} has no labels; pass (images, labels), or targets='predictions'"
            )
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"loader: batch {number}: expected whole-number labels of shape ({count},), got {labels.dtype} of "
                f"shape {tuple(labels.shape)}"
            )
        return labels


class _Sample:
    """At most ``capacity`` of the rows seen, each with the same chance (reservoir sampling, always the same draw)."""

    def __init__(self, columns: int) -> None:
        self.capacity = max(_SAMPLE_BYTES // (8 * max(columns, 1)), 256)
        self.rows: list[Tensor] = []
        self.labels: list[int] = []
        self.seen = 0
        self.generator = torch.Generator().manual_seed(0)

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        for row, label in zip(vectors, labels.tolist(), strict=True):
            self.seen += 1
            if len(self.rows) < self.capacity:
                self.rows.append(row.clone())
                self.labels.append(label)
                continue
            place = int(torch.randint(self.seen, (), generator=self.generator))
            if place < self.capacity:
                self.rows[place] = row.clone()
                self.labels[place] = label


class _Sums:
    """What one pass leaves: X^T X, X^T L, counts, and a bounded sample of vectors with their classes."""

    def __init__(self, columns: int, classes: int, device: torch.device) -> None:
        self.gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.cross = torch.zeros(columns, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)
        self.sample = _Sample(columns)

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        one_hot = torch.nn.functional.one_hot(labels, len(self.counts)).to(vectors)
        self.gram.addmm_(vectors.T, vectors)
        self.cross.addmm_(vectors.T, one_hot)
        self.counts += one_hot.sum(0)
        self.sample.add(vectors, labels)

    def solve(self, mu: float, positive: bool, max_iterations: int) -> Solution:
        """The mu-lasso, without the weights that are only what the solver's last digits left."""
        solution = mu_lasso(
            self.gram, self.cross, mu, positive=positive, squares=self.counts, max_iterations=max_iterations
        )
        w = solution.weights
        return solution._replace(weights=torch.where(w.abs() > _NO_WEIGHT * w.abs().amax(0), w, 0.0))

    def fit(self, solution: Solution) -> Fit:
        w = solution.weights
        residual = (w * (self.gram @ w - 2 * self.cross)).sum() + self.counts.sum()
        told = (torch.stack(self.sample.rows) @ w).argmax(1).cpu()
        right = (told == torch.tensor(self.sample.labels)).double().mean()
        images = int(self.counts.sum())
        return Fit(
            images=images,
            residual=max(float(residual), 0.0) / images,
            accuracy=float(right),
            gap=float((solution.gap.clamp(min=0) / (0.5 * self.counts).clamp(min=0.5)).max()),
            iterations=solution.iterations,
        )


@overload
def select_features(
    model: nn.Module, loader: Any, *, layers: Any = "auto", classes: int | Sequence[str] | None = None,
    mu: float = 10.0, targets: str = "labels", positive: bool = True, skip_constant: bool = False,
    channel_dim: int | None = None, max_iterations: int = 20_000,
) -> Selection: ...  # fmt: skip


@overload
def select_features(
    model: nn.Module, loader: Any, *, layers: Any = "auto", classes: int | Sequence[str] | None = None,
    mu: Sequence[float], targets: str = "labels", positive: bool = True, skip_constant: bool = False,
    channel_dim: int | None = None, max_iterations: int = 20_000,
) -> list[Selection]: ...  # fmt: skip


def select_features(
    model: nn.Module,
    loader: Any,
    *,
    layers: Any = "auto",
    classes: int | Sequence[str] | None = None,
    mu: float | Sequence[float] = 10.0,
    targets: str = "labels",
    positive: bool = True,
    skip_constant: bool = False,
    channel_dim: int | None = None,
    max_iterations: int = 20_000,
) -> Selection | list[Selection]:
    """Which channels tell the classes: the mu-lasso from feature vectors to classes.

    Image n has the vector x_n of all channels' shares of their layer's energy, ||f_pq||^2 / sum_q ||f_pq||^2, layer
    after layer (Q numbers), and the one-hot row l_n of its class. Class j gets the weights

        w_j = argmin 1/2 ||X w - l_j||^2    with  w >= 0  and  sum w <= mu

    (Oramas et al. 2019; the sign and the shares as in later code of that group, no mean removed, no intercept). The
    channels with a weight are the relevant ones. One pass; X^T X (Q x Q, float64) is what it holds: 1.2 GB at
    Q = 12,416. A small ``mu`` chooses few channels, from early layers too, a large one the most telling of the last.

    Args:
        model: In eval mode; run without autograd.
        loader: Yields (images, labels), each (B, ...) and (B,). Read once; twice with ``skip_constant``.
        layers: "auto" (repeated blocks, else activation modules), names, modules, or a predicate (name, module).
        classes: Their number, or their names; default: the width of the logits.
        mu: The bound; a sequence gives one selection for each, from the same pass.
        targets: "labels", or "predictions": what the model itself says.
        positive: w >= 0. False bounds ``sum |w|``.
        skip_constant: Leave out channels that are one constant on all images, such as dead filters whose norm still
            adds beta: they change the shares of their layer. With it a model and its compacted twin have the same
            selection.
        channel_dim: Where the channels are. Default 1; for three dimensions the last one, unless the model has
            convolutions or batch norms over sequences.
        max_iterations: Of the solver, which warns if that was not enough.

    Returns:
        `Selection`, or a list of them in the order of ``mu``. Look at ``selection.fit.accuracy``: if it is low, these
        features do not tell the classes.

    Raises:
        ValueError: scripted, compiled or wrapped model; training mode with batch norm or dropout; unknown layer; NaN;
            labels out of range; an empty loader, or one that must be read twice and cannot.
    """
    check_model(model, "select_features")
    check_choice("targets", targets, TARGETS)
    mus = _check_mu(mu)
    work = _Pass(model, chosen_layers(model, layers), targets, channel_dim)
    kept = work.varying(loader) if skip_constant else {}
    names, sums = _summed(work, loader, kept, classes)
    skipped = {n: (~k).nonzero().flatten().tolist() for n, k in kept.items() if not bool(k.all())}
    selections = []
    for bound in mus:
        solution = sums.solve(bound, positive, max_iterations)
        selections.append(Selection(
            weights=solution.weights.cpu(), layers=dict(work.widths), classes=names, mu=bound, positive=positive,
            fit=sums.fit(solution), producers=dict(work.producers), skipped=skipped, channel_dim=channel_dim,
        ))  # fmt: skip
    return selections if isinstance(mu, Sequence) else selections[0]


def _summed(
    work: _Pass, loader: Any, kept: dict[str, Tensor], classes: int | Sequence[str] | None
) -> tuple[tuple[str, ...], _Sums]:
    """The names of the classes, and the sums over the loader."""
    names: tuple[str, ...] = ()
    sums: _Sums | None = None
    with closing(work.energies(loader)) as found:
        for number, (energies, labels) in enumerate(found):
            vectors = torch.cat([shares(energy, kept.get(name)) for name, energy in energies.items()], 1)
            vectors = vectors.double() if vectors.device.type != "mps" else vectors.cpu().double()
            if sums is None:
                names = _class_names(classes, work.classes)
                sums = _Sums(vectors.shape[1], len(names), vectors.device)
            labels = labels.to(vectors.device).long()
            if bool(((labels < 0) | (labels >= len(names))).any()):
                raise ValueError(
                    f"loader: batch {number} has labels from {int(labels.min())} to {int(labels.max())}, expected "
                    f"0 to {len(names) - 1}"
                )
            sums.add(vectors, labels)
    assert sums is not None  # `batches` refuses an empty loader
    return names, sums


def _check_mu(mu: Any) -> list[float]:
    values = list(mu) if isinstance(mu, Sequence) and not isinstance(mu, str) else [mu]
    if not values:
        raise ValueError("mu: expected a number or at least one, got an empty sequence")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"mu: expected a number or a sequence of numbers, got {type(value).__name__}")
        if not 0 < value < float("inf"):
            raise ValueError(f"mu: expected a positive finite number, got {value}")
    return [float(value) for value in values]


def _class_names(classes: int | Sequence[str] | None, logits: int) -> tuple[str, ...]:
    if classes is None:
        if not logits:
            raise ValueError("classes: the model returns no logits (B, classes); pass their number or names")
        classes = logits
    if isinstance(classes, int) and not isinstance(classes, bool):
        if classes < 1:
            raise ValueError(f"classes: expected at least 1, got {classes}")
        return tuple(str(index) for index in range(classes))
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise TypeError(f"classes: expected their number or their names, got {classes!r}")
    return tuple(str(name) for name in classes)
