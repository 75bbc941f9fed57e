"""`explain`: what the relevant features of an image's class look at, in one forward and one backward a rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ffr_ext.checks import check_choice

from .capture import Layers, channel_dim_of, check_model, device_of, first_tensor
from .features import channel_energies
from .rules import RELU_RULES, backward_rule
from .selection import Selection


class Feature(NamedTuple):
    """A feature that spoke for the class of an image, and how much."""

    layer: str
    channel: int
    response: float


@dataclass(frozen=True)
class Explanation:
    """Heatmaps of a batch, each in [0, 1].

    Attributes:
        heat: (B, H, W), the largest over the ranks.
        parts: (B, top, H, W), one for each rank; zeros where the image has no further feature.
        features: For each image its features in order of rank; None for a part of zeros.
        target: (B,), the class that is explained.
    """

    heat: Tensor
    parts: Tensor
    features: list[list[Feature | None]]
    target: Tensor

    def for_quantus(self, masks: Tensor | None = None) -> dict[str, Any]:
        """Numpy arguments of Quantus' metrics: ``metric(model, x_batch=x.numpy(), **explanation.for_quantus(masks))``.

        ``a_batch`` (B, 1, H, W), ``y_batch`` (B,), and with ``masks`` (B, H, W) ``s_batch`` (B, 1, H, W).
        """
        arrays = {"a_batch": self.heat[:, None].cpu().numpy(), "y_batch": self.target.cpu().numpy()}
        if masks is not None:
            if masks.shape != self.heat.shape:
                raise ValueError(f"masks: expected shape {tuple(self.heat.shape)}, got {tuple(masks.shape)}")
            arrays["s_batch"] = masks[:, None].cpu().numpy()
        return arrays


def explain(
    model: nn.Module,
    x: Tensor,
    selection: Selection,
    *,
    top: int = 3,
    target: Tensor | int | None = None,
    rule: str = "guided",
    strides: str = "resize",
    align: str = "exact",
) -> Explanation:
    """Heatmaps of the ``top`` relevant features that respond most to each image.

    For class c (``target``, or what the model says) and feature vector v (`select_features`) the responses are
    r = v / ||v||_2 * w_c / sum(w_c). From each of the largest positive ones, the channel's own map goes back to the
    image under `backward_rule`; its heat is the largest magnitude over the colours (our choice), divided by the largest
    of the image (Oramas et al. 2019). All images share one forward, and one backward for each rank.

    Args:
        model: In eval mode; its parameters need no gradient, and get none.
        x: Images (B, C, H, W), or (B, C, ...) of another rank; images of a batch do not influence each other.
        selection: Made on this model, or carried over with ``Selection.in_source``.
        target: A class for all, or one for each (B,).
        rule, strides, align: See `backward_rule`.

    Raises:
        ValueError: a model that cannot be explained, another model's selection, NaN, a class out of range.
        RuntimeError: a layer that ran without autograd. In each case the model is as it was.
    """
    _check_arguments(model, x, top, rule)
    energies: dict[str, Tensor] = {}
    maps: dict[str, tuple[Tensor, int]] = {}
    needed = {name for name in selection.layers if selection.channels(name)}

    def take(name: str, module: nn.Module, feature: Tensor) -> Tensor | None:
        dim = channel_dim_of(model, feature, selection.channel_dim)
        energies[name] = channel_energies(feature, dim)
        if name not in needed:
            return None
        if not feature.requires_grad:
            raise RuntimeError(
                f"explain: layer {name!r} ran without autograd; the model switches it off in its forward"
            )
        maps[name] = (feature, dim)
        return feature.clone()  # what follows may overwrite its input in place

    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), backward_rule(rule, strides, align=align):
        with Layers(model, selection.modules(model), take) as run:
            output = run(leaf)
        selection.check_fits({name: e.shape[1] for name, e in energies.items()}, "explain")
        classes = _classes(target, output, len(x), len(selection.classes))
        rows, responses = _strongest(selection, energies, classes, top)
        parts = torch.stack(
            [_heat(leaf, maps, selection, row, k < top - 1) for k, row in enumerate(rows.T)], 1
        )
    features = [
        [
            Feature(*selection.feature(row), response) if row >= 0 else None
            for row, response in zip(*pair, strict=True)
        ]
        for pair in zip(rows.tolist(), responses.tolist(), strict=True)
    ]
    _warn_of_silence(features)
    return Explanation(parts.amax(1), parts, features, classes.cpu())


def _check_arguments(model: Any, x: Any, top: Any, rule: str) -> None:
    check_model(model, "explain")
    check_choice("rule", rule, RELU_RULES)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise TypeError("x: expected a floating-point tensor of images (B, C, ...)")
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite pixels, got NaN or infinity")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top: expected a whole number of at least 1, got {top!r}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("explain: it needs gradients; leave torch.inference_mode()")


def _warn_of_silence(features: list[list[Feature | None]]) -> None:
    silent = [index for index, ranks in enumerate(features) if ranks[0] is None]
    if silent:
        warnings.warn(
            f"explain: no relevant feature responds to images {silent[:8]}: their heat is zero",
            RuntimeWarning,
            stacklevel=3,
        )


def _classes(target: Tensor | int | None, output: Any, count: int, classes: int) -> Tensor:
    if target is None:
        logits = first_tensor(output)
        if logits is None or logits.dim() != 2:
            raise ValueError("target: the model returns no logits (B, classes); say which class to explain")
        chosen = logits.detach().argmax(1)
    else:
        chosen = torch.as_tensor(target)
        if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.shape not in ((), (count,)):
            raise ValueError(
                f"target: expected a class or {count} of them, got {chosen.dtype} of shape {tuple(chosen.shape)}"
            )
        chosen = chosen.expand(count)
    if bool(((chosen < 0) | (chosen >= classes)).any()):
        raise ValueError(f"target: expected classes from 0 to {classes - 1}, got {chosen.unique().tolist()}")
    return chosen.long()


def _strongest(
    selection: Selection, energies: dict[str, Tensor], classes: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Rows of the selection and their responses (B, top); row -1, response 0 where no positive one is left."""
    v = selection.vector(energies).cpu().double()
    if not bool(v.isfinite().all()):
        raise ValueError("explain: a layer of the selection is NaN or infinite on these images")
    w = selection.weights.T[classes.cpu()]
    tiny = torch.finfo(torch.float64).tiny
    r = v / v.norm(dim=1, keepdim=True).clamp(min=tiny) * w / w.abs().sum(1, keepdim=True).clamp(min=tiny)
    ordered = torch.sort(r, dim=1, descending=True, stable=True)
    responses, rows = ordered.values[:, :top], ordered.indices[:, :top]
    missing = max(top - r.shape[1], 0)
    responses = torch.nn.functional.pad(responses, (0, missing))
    rows = torch.nn.functional.pad(rows, (0, missing), value=-1)
    return torch.where(responses > 0, rows, -1), responses.clamp(min=0)


def _heat(
    leaf: Tensor, maps: dict[str, tuple[Tensor, int]], selection: Selection, rows: Tensor, more: bool
) -> Tensor:
    """The heat of one feature of each image, all in one backward pass: each image starts in one layer only."""
    starts: dict[str, Tensor] = {}
    for image, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        name, channel = selection.feature(row)
        feature, dim = maps[name]
        if name not in starts:
            starts[name] = torch.zeros_like(feature)
        starts[name][image].select(dim - 1, channel).copy_(feature[image].select(dim - 1, channel).detach())
    if not starts:
        return _to_heat(torch.zeros_like(leaf))
    (signal,) = torch.autograd.grad(
        [maps[name][0] for name in starts], leaf, list(starts.values()), retain_graph=more, allow_unused=True
    )
    if signal is None:
        raise RuntimeError(f"explain: layers {list(starts)} do not depend on the image")
    return _to_heat(signal)


def _to_heat(signal: Tensor) -> Tensor:
    heat = signal.detach().abs()
    if heat.dim() > 2:
        heat = heat.amax(1)
    heat = heat if heat.dtype == torch.float64 else heat.float()
    largest = heat.flatten(1).amax(1).clamp(min=torch.finfo(heat.dtype).tiny)
    return heat / largest.view(-1, *[1] * (heat.dim() - 1))


def explain_func(selection: Selection, **options: Any) -> Callable[..., Any]:
    """`explain` as Quantus' ``explain_func(model, inputs, targets, **kwargs)``, numpy in and (B, 1, H, W) out."""

    def call(model: nn.Module, inputs: Any, targets: Any, **ignored: Any) -> Any:
        x = torch.as_tensor(inputs).to(device_of(model))
        parameter = next(model.parameters(), None)
        if parameter is not None:
            x = x.to(parameter.dtype)  # numpy's pixels are often float64
        target = torch.as_tensor(targets).long()
        return explain(model, x, selection, target=target, **options).for_quantus()["a_batch"]

    return call
