"""What penalties on groups of weights ask of memory, each in one launch for a list of tensors: the norms of the rows
and columns of a tensor in one read, gradients proportional to the weights, and shrinking in place.

A tensor of shape (O, I, ...) is seen as W[o, i, k]: its row o is the slice `W[o]`, its column i the slice `W[:, i]`,
whatever the order in memory. A 1-D tensor has rows of one element and no columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import backends, ops
from ..pruning.norms import NORM_DTYPES, dense, norms_along, tensor_list

__all__ = ["add_scaled_", "row_column_norms", "shrink_"]

# One vector of factors for each tensor, or None where a tensor has none; None for no factors at all.
Factors = Sequence[Tensor | None] | None


def row_column_norms(
    tensors: Sequence[Tensor], p: float = 2, *, backend: str = "auto"
) -> list[tuple[Tensor, Tensor | None]]:
    """The p-norms of all rows and of all columns of every tensor, each tensor read once.

    Equal to, for each tensor w of two or more dimensions::

        (torch.linalg.vector_norm(w.float().flatten(1), p, dim=1),
         torch.linalg.vector_norm(w.float().transpose(0, 1).flatten(1), p, dim=1))

    but accumulated in float64. NaN gives NaN.

    Args:
        tensors: Dense tensors of one or more dimensions, float16, bfloat16, float32 or float64, mixed as they come.
        p: 1, 2 or ``math.inf``.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        For each tensor the ``w.shape[0]`` norms of its rows and the ``w.shape[1]`` norms of its columns (None for a
        1-D tensor), on its device; float64 for float64 tensors, else float32. Not differentiable. Those of one
        device are views of one tensor: clone what is changed or kept long.

    Raises:
        TypeError: ``tensors`` is not a sequence of tensors. ValueError: another p, a dtype that is not listed, or a
            tensor without dimensions.
    """
    weights = _weights("tensors", tensors)
    found = norms_along(weights, p, [-1 if w.ndim > 1 else 0 for w in weights], backend)
    return [
        (norms, None) if w.ndim == 1 else (norms[: w.shape[0]], norms[w.shape[0] :])
        for norms, w in zip(found, weights, strict=True)
    ]


def add_scaled_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: Factors = None,
    columns: Factors = None,
    slope: float | Sequence[float] = 0.0,
    tau: float | Sequence[float] = 0.0,
    *,
    backend: str = "auto",
) -> None:
    """Add multiples of the weights to the gradients, in place and in one launch::

        G[o, i, k] += W[o, i, k] * (r[o] + q[i] + slope * (|W[o, i, k]| <= tau))

    Computed in float32 (float64 for float64 weights) and rounded once. A NaN weight gives a NaN gradient.

    Args:
        grads: What is added to: one tensor for each weight, of its shape, dtype and device. No two may share memory.
        weights: Dense tensors, float16, bfloat16, float32 or float64, mixed as they come. Grads in the same layout in
            memory are the fast case; others are written through a copy.
        rows: r, for each tensor a 1-D floating-point tensor of ``w.shape[0]`` entries on its device, or None for 0.
        columns: q, likewise of ``w.shape[1]`` entries.
        slope: One finite number for all, or one for each tensor.
        tau: One finite number of 0 or more for all, or one for each tensor.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: an argument is not as above. Raised before anything is written.
    """
    targets = tensor_list("grads", grads)
    sources = _weights("weights", weights)
    if len(targets) != len(sources):
        raise ValueError(f"grads: expected one for each of the {len(sources)} weights, got {len(targets)}")
    for index, (grad, weight) in enumerate(zip(targets, sources, strict=True)):
        _check_like(f"grads[{index}]", grad, f"weights[{index}]", weight)
    _refuse_shared("grads", targets)
    scales = _scales(sources, rows, columns)
    slopes = _numbers("slope", slope, len(sources))
    taus = _numbers("tau", tau, len(sources), least=0.0)
    with torch.no_grad():
        for chosen, here in _by_device(sources, backend):
            some_targets, some_sources = [targets[i] for i in here], [sources[i] for i in here]
            some_scales = [scales[i] for i in here]
            limits = [slopes[i] for i in here], [taus[i] for i in here]
            if chosen == "reference":
                _add_by_torch(some_targets, some_sources, some_scales, *limits)
            else:
                _add_fused(chosen, some_targets, some_sources, some_scales, *limits)


def shrink_(
    weights: Sequence[Tensor],
    rows: Factors = None,
    columns: Factors = None,
    tau: float | Sequence[float] = 0.0,
    *,
    backend: str = "auto",
) -> None:
    """Scale the weights and cut off what is small, in place and in one launch::

        W[o, i, k] *= r[o] * q[i];  W[o, i, k] = 0 where |W[o, i, k]| <= tau

    Computed in float32 (float64 for float64 weights), compared before the one rounding. With ``tau=0`` a -0.0 becomes
    0.0. NaN stays NaN.

    Args:
        weights: Dense tensors, float16, bfloat16, float32 or float64, mixed as they come. No two may share memory.
        rows: r, for each tensor a 1-D floating-point tensor of ``w.shape[0]`` entries on its device, or None for 1.
        columns: q, likewise of ``w.shape[1]`` entries.
        tau: One finite number of 0 or more for all, or one for each tensor.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        TypeError, ValueError: an argument is not as above. Raised before anything is written.
    """
    targets = _weights("weights", weights)
    _refuse_shared("weights", targets)
    scales = _scales(targets, rows, columns)
    taus = _numbers("tau", tau, len(targets), least=0.0)
    with torch.no_grad():
        for chosen, here in _by_device(targets, backend):
            some = [targets[i] for i in here], [scales[i] for i in here], [taus[i] for i in here]
            if chosen == "reference":
                _shrink_by_torch(*some)
            else:
                _shrink_fused(chosen, *some)


class _Scale(NamedTuple):
    """The factors of the rows and columns of one tensor; None where there are none."""

    rows: Tensor | None
    columns: Tensor | None


# ------------------------------------------------------------------------------------------------------------
# The kernels
# ------------------------------------------------------------------------------------------------------------


def _add_fused(
    backend: str,
    grads: list[Tensor],
    weights: list[Tensor],
    scales: list[_Scale],
    slopes: list[float],
    taus: list[float],
) -> None:
    # The kernel wants grad and weight to lie alike, without gaps: what does not, goes by way of a copy.
    written = dense(grads)
    read = [
        w if _lie_alike(w, g) else torch.empty_like(g).copy_(w) for w, g in zip(weights, written, strict=True)
    ]
    ops.kernel("add_scaled_", backend)(written, read, *_vectors(weights, scales), slopes, taus)
    _bring_back(grads, written)


def _shrink_fused(backend: str, weights: list[Tensor], scales: list[_Scale], taus: list[float]) -> None:
    written = dense(weights)
    ops.kernel("shrink_", backend)(written, *_vectors(weights, scales), taus)
    _bring_back(weights, written)


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether element i of both lies at the same offset, `b` being dense."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _vectors(weights: list[Tensor], scales: list[_Scale]) -> tuple[list[Tensor], list[Tensor]]:
    nothing = weights[0].new_empty(0)
    rows, columns = (
        [nothing if f is None else _plain(f, w) for f, w in zip(side, weights, strict=True)]
        for side in zip(*scales, strict=True)
    )
    return rows, columns


def _plain(factors: Tensor, weight: Tensor) -> Tensor:
    dtype = _compute_dtype(weight)
    if factors.dtype == dtype and factors.is_contiguous():
        return factors
    return factors.to(dtype).contiguous()


def _bring_back(tensors: list[Tensor], written: list[Tensor]) -> None:
    """Into the tensors what was written into copies. The others were written behind autograd's back: it must know,
    or a backward pass would take the new values for the saved ones.
    """
    direct = [t for t, w in zip(tensors, written, strict=True) if t is w]
    increment_version(direct)
    for tensor, copy in zip(tensors, written, strict=True):
        if tensor is not copy:
            tensor.copy_(copy)


# ------------------------------------------------------------------------------------------------------------
# In plain torch
# ------------------------------------------------------------------------------------------------------------


def _add_by_torch(
    grads: list[Tensor], weights: list[Tensor], scales: list[_Scale], slopes: list[float], taus: list[float]
) -> None:
    for grad, weight, scale, slope, tau in zip(grads, weights, scales, slopes, taus, strict=True):
        w = weight.detach().to(_compute_dtype(weight))
        factor = sum(_shaped(weight, scale), w.new_zeros(())) + slope * (w.abs() <= tau).to(w.dtype)
        grad.copy_(grad.detach().to(w.dtype) + w * factor)


def _shrink_by_torch(weights: list[Tensor], scales: list[_Scale], taus: list[float]) -> None:
    for weight, scale, tau in zip(weights, scales, taus, strict=True):
        w = weight.detach().to(_compute_dtype(weight))
        w = w * math.prod(_shaped(weight, scale), start=w.new_ones(()))
        weight.copy_(torch.where(w.abs() <= tau, 0.0, w))


def _shaped(weight: Tensor, scale: _Scale) -> Iterator[Tensor]:
    """The factors that there are, in the compute dtype and in shapes that go with the weight's."""
    for dim, factors in enumerate(scale):
        if factors is not None:
            yield factors.detach().to(_compute_dtype(weight)).view(-1, *[1] * (weight.dim() - 1 - dim))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------


def _by_device(tensors: Sequence[Tensor], backend: str) -> list[tuple[str, list[int]]]:
    """A concrete backend for the tensors of each device: all are found before anything is written."""
    devices = list(dict.fromkeys(t.device for t in tensors))
    chosen = [backends.resolve(backend, device) for device in devices]
    if len(devices) == 1:
        return [(chosen[0], list(range(len(tensors))))]
    return [
        (name, [i for i, t in enumerate(tensors) if t.device == device])
        for name, device in zip(chosen, devices, strict=True)
    ]


def _weights(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    weights = tensor_list(name, tensors)
    for index, weight in enumerate(weights):
        if weight.dtype not in NORM_DTYPES:
            raise ValueError(
                f"{name}[{index}]: expected dtype float16, bfloat16, float32 or float64, got {weight.dtype}"
            )
        if weight.ndim == 0:
            raise ValueError(f"{name}[{index}]: expected at least one dimension, got a tensor without any")
    return weights


def _check_like(name: str, grad: Tensor, weight_name: str, weight: Tensor) -> None:
    for what, got, expected in (
        ("shape", tuple(grad.shape), tuple(weight.shape)),
        ("dtype", grad.dtype, weight.dtype),
        ("device", grad.device, weight.device),
    ):
        if got != expected:
            raise ValueError(f"{name}: expected the {what} of {weight_name}, {expected}, got {got}")


def _refuse_shared(name: str, tensors: Sequence[Tensor]) -> None:
    """What is written must not be written twice: threads would race for it."""
    first: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel() and first.setdefault(tensor.data_ptr(), index) != index:
            other = first[tensor.data_ptr()]
            raise ValueError(f"{name}[{index}]: expected memory of its own, got that of {name}[{other}]")


def _scales(weights: Sequence[Tensor], rows: Factors, columns: Factors) -> list[_Scale]:
    sides = _factors("rows", rows, weights, 0), _factors("columns", columns, weights, 1)
    return [_Scale(*pair) for pair in zip(*sides, strict=True)]


def _factors(name: str, factors: Factors, weights: Sequence[Tensor], dim: int) -> list[Tensor | None]:
    if factors is None:
        return [None] * len(weights)
    if isinstance(factors, Tensor) or not isinstance(factors, Sequence):
        raise TypeError(
            f"{name}: expected a list with a tensor or None for each weight, got {type(factors).__name__}"
        )
    if len(factors) != len(weights):
        raise ValueError(f"{name}: expected one for each of the {len(weights)} weights, got {len(factors)}")
    for index, (factor, weight) in enumerate(zip(factors, weights, strict=True)):
        if factor is not None:
            _check_factor(f"{name}[{index}]", factor, weight, dim)
    return list(factors)


def _check_factor(name: str, factor: Tensor, weight: Tensor, dim: int) -> None:
    if not isinstance(factor, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(factor).__name__}")
    if weight.ndim <= dim:
        raise ValueError(
            f"{name}: expected None, since a weight of shape {tuple(weight.shape)} has no columns"
        )
    if factor.ndim != 1 or factor.shape[0] != weight.shape[dim]:
        raise ValueError(f"{name}: expected shape ({weight.shape[dim]},), got {tuple(factor.shape)}")
    if not factor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {factor.dtype}")
    if factor.device != weight.device:
        raise ValueError(f"{name}: expected a tensor on {weight.device}, got one on {factor.device}")


def _numbers(
    name: str, value: float | Sequence[float], count: int, *, least: float = -math.inf
) -> list[float]:
    """One finite number for each tensor."""
    if isinstance(value, Real):
        return [_number(name, value, least)] * count
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a number, or one for each tensor, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(
            f"{name}: expected one number, or one for each of the {count} tensors, got {len(value)}"
        )
    return [_number(f"{name}[{index}]", v, least) for index, v in enumerate(value)]


def _number(name: str, value: Any, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value) or value < least:
        wanted = "a finite number" if least == -math.inf else f"a finite number of {least:g} or more"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return float(value)
