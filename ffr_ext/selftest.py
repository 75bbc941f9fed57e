"""`selftest`: every available backend against the reference in float64, on the user's machine.

Kernels that are right on one GPU generation have been wrong on another without any error; this is how to
find out.
The module has not the function's name: importing it would hide the function in the package.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TextIO

import torch
from torch import Tensor

from . import backends, reference
from .functional import ffr_loss
from .pruning import compact_filters, filter_norms
from .regularizers.fused import add_scaled_, row_column_norms, shrink_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A stage longer than a kernel holds at once, sizes that are no multiple of a vector or a sign block, several
# chunks.
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((3, 5, 7),) * 4,
    ((2, 16, 8, 8),) * 3 + ((2, 32, 4, 4),) * 3,
    ((2, 37),) * 70,
    ((2, 20011),) * 3,
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"norm": "l1"},
    {"norm": "l1", "transition": "pool"},
    {"norm": "l2_squared", "reduction": "sum"},
    {"norm": "l2"},
    {"norm": "l2", "curvature_kind": "angle", "reduction": "batchmean"},
)

# Units in the last place, of the largest number of a result, allowed on top of plain torch in that dtype.
ALLOWED_UNITS = 8


@dataclass(frozen=True)
class Check:
    """One line of the report: a kernel of a backend in one dtype."""

    backend: str
    device: str
    what: str
    dtype: str
    cases: int
    worst: float  # largest error over what is allowed; above 1 is a mismatch
    failure: str | None  # the first mismatch or exception

    @property
    def ok(self) -> bool:
        return self.failure is None


@dataclass
class SelfTest:
    """The outcome of :func:`selftest`. True where every check passed; `str` is the table."""

    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [f"{'backend':10} {'device':8} {'checked':16} {'dtype':10} {'cases':>5}  error / allowed"]
        for c in self.checks:
            state = f"{c.worst:15.2f}  ok" if c.ok else f"{c.worst:15.2f}  WRONG: {c.failure}"
            lines.append(f"{c.backend:10} {c.device:8} {c.what:16} {c.dtype:10} {c.cases:5}  {state}")
        verdict = (
            "all backends agree with the reference"
            if self.ok
            else "MISMATCH: do not use the backends marked WRONG"
        )
        return "\n".join([*lines, f"{verdict} ({self.seconds:.1f} s)"])


def selftest(backend: str | None = None, *, file: TextIO | None = None) -> SelfTest:
    """Compare the kernels of every available backend with the reference in float64, and print a table.

    Loss and gradients over dtypes, norms, layouts, ties and odd sizes; filter norms; compaction; scaling by rows and
    columns. An error may be as large as that of plain torch in the same dtype plus 8 units in the last place. The
    same as `python -m ffr_ext selftest`, which exits with status 1 on a mismatch.

    Args:
        backend: only this one: "cpu", "cuda" or "triton"; default: all that are available here. With none at
            all (a pure-Python install without a GPU) nothing is checked, and that is said.
        file: where to print; default: stdout.

    Returns:
        SelfTest: false in a boolean context if anything differs.

    Raises:
        ValueError: an unknown backend. RuntimeError: `backend` is not available; the message has the reason.
    """
    began = time.perf_counter()
    outcome = SelfTest()
    for name, device in _places(backend):
        for dtype in DTYPES:
            outcome.checks.append(
                _run(name, device, "loss, gradients", dtype, _loss_cases(name, device, dtype))
            )
            outcome.checks.append(_run(name, device, "filter norms", dtype, _norm_cases(name, device, dtype)))
            outcome.checks.append(_run(name, device, "compaction", dtype, _gather_cases(name, device, dtype)))
            outcome.checks.append(
                _run(name, device, "group scaling", dtype, _group_cases(name, device, dtype))
            )
    outcome.seconds = time.perf_counter() - began
    if not outcome.checks:
        print(
            "no fused backend is available here; `python -m ffr_ext info` says why", file=file or sys.stdout
        )
    else:
        print(outcome, file=file or sys.stdout)
    return outcome


def _places(backend: str | None) -> list[tuple[str, str]]:
    """(backend, device) pairs to check."""
    if backend == "reference":
        raise ValueError(
            "backend: expected 'cpu', 'cuda' or 'triton'; the reference is what they are compared with"
        )
    if backend is not None:
        device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
        return [(backends.resolve(backend, device), device)]
    places = []
    for name, status in backends.available().items():
        if status.available and name != "reference":
            places.append((name, "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"))
    return places


# A case gives the error of the backend and the error that is allowed.
Case = Callable[[], tuple[float, float]]


def _run(
    backend: str, device: str, what: str, dtype: torch.dtype, cases: Iterator[tuple[str, Case]]
) -> Check:
    worst, failure, count = 0.0, None, 0
    for label, case in cases:
        count += 1
        try:
            error, allowed = case()
            share = error / allowed if allowed else (0.0 if error == 0 else math.inf)
        except Exception as problem:
            share = math.inf
            label = f"{label}: {type(problem).__name__}: {problem}"
        if math.isnan(share):
            share = math.inf
        if share > 1 and failure is None:
            failure = label
        worst = max(worst, share)
    return Check(backend, device, what, str(dtype).removeprefix("torch."), count, worst, failure)


def _loss_cases(backend: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    generator = torch.Generator().manual_seed(0)
    for shapes in SHAPES:
        features = [torch.randn(s, generator=generator, dtype=torch.float64).relu() for s in shapes]
        features = [f.to(device, dtype) for f in features]
        layouts = [("contiguous", features)]
        if features[0].dim() == 4:
            layouts.append(
                ("channels_last", [f.contiguous(memory_format=torch.channels_last) for f in features])
            )
        layouts.append(
            ("unaligned", [torch.cat([f.new_zeros(1), f.flatten()])[1:].view(f.shape) for f in features])
        )
        for layout, laid in layouts:
            for options in OPTIONS:
                label = f"{options}, {len(shapes)} features of {shapes[0]}, {layout}"
                yield label, partial(_loss_case, laid, backend, options)


def _loss_case(features: Sequence[Tensor], backend: str, options: dict[str, Any]) -> tuple[float, float]:
    weighted: dict[str, Any] = {"gradient": 0.7, "curvature": 1.3, **options}
    truth = _loss_and_grads([f.double() for f in features], lambda f: reference.ffr_loss(f, **weighted))
    eager = _loss_and_grads(features, lambda f: ffr_loss(f, backend="reference", **weighted))
    ours = _loss_and_grads(features, lambda f: ffr_loss(f, backend=backend, **weighted))
    worst = (0.0, 1.0)
    largest = max(g.abs().max().item() for g in truth[1:])
    for index, (a, b, t) in enumerate(zip(ours, eager, truth, strict=True)):
        scale = t.abs().item() if index == 0 else largest
        unit = torch.finfo(a.dtype).eps * scale
        error, unavoidable = ((x.double() - t).abs().max().item() for x in (a, b))
        allowed = unavoidable + ALLOWED_UNITS * unit
        if not error <= worst[0] / worst[1] * allowed:  # NaN is worse than anything
            worst = (error, allowed)
    return worst


def _loss_and_grads(features: Sequence[Tensor], loss: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    leaves = [f.detach().requires_grad_() for f in features]
    value = loss(leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _weights(device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5, 3, 3), (33, 16), (4, 6, 1), (130, 2, 5)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [*weights, weights[0].contiguous(memory_format=torch.channels_last)]


def _norm_cases(backend: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    weights = _weights(device, dtype)
    for p in (1, 2, math.inf):
        for dim in (0, 1):

            def case(p: float = p, dim: int = dim) -> tuple[float, float]:
                ours = filter_norms(weights, p, dim, backend=backend)
                error, allowed = 0.0, 1.0
                for weight, norms in zip(weights, ours, strict=True):
                    others = [d for d in range(weight.dim()) if d != dim]
                    truth = torch.linalg.vector_norm(weight.double(), p, dim=others)
                    unit = torch.finfo(norms.dtype).eps * truth.max().item()
                    here = (norms.double() - truth).abs().max().item()
                    if not here * allowed <= error * ALLOWED_UNITS * unit:
                        error, allowed = here, ALLOWED_UNITS * unit
                return error, allowed

            yield f"p={p}, dim={dim}", case

        def both(p: float = p) -> tuple[float, float]:
            truth = row_column_norms([w.double() for w in weights], p, backend="reference")
            ours = row_column_norms(weights, p, backend=backend)
            return _worst(
                (a, b)
                for pair, true in zip(ours, truth, strict=True)
                for a, b in zip(pair, true, strict=True)
            )

        yield f"p={p}, rows and columns", both


def _worst(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> tuple[float, float]:
    """The largest error over what is allowed among pairs of results and truths."""
    error, allowed = 0.0, 1.0
    for ours, truth in pairs:
        if ours is None or truth is None or truth.numel() == 0:
            continue
        unit = ALLOWED_UNITS * torch.finfo(ours.dtype).eps * truth.abs().max().item()
        here = (ours.double() - truth).abs().max().item()
        if not here * allowed <= error * unit:  # NaN is worse than anything
            error, allowed = here, unit
    return error, allowed


def _group_cases(backend: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    weights = _weights(device, dtype)
    norms = row_column_norms([w.double() for w in weights], backend="reference")
    rows, columns = ([1 + side for side in sides if side is not None] for sides in zip(*norms, strict=True))

    def add() -> tuple[float, float]:
        grads = [w.clone() for w in weights]
        truth = [w.double() for w in weights]
        add_scaled_(grads, weights, rows, columns, -0.5, 0.7, backend=backend)
        add_scaled_(truth, [t.clone() for t in truth], rows, columns, -0.5, 0.7, backend="reference")
        return _worst(zip(grads, truth, strict=True))

    def shrink() -> tuple[float, float]:
        ours, truth = [w.clone() for w in weights], [w.double() for w in weights]
        shrink_(ours, rows, columns, 0.0, backend=backend)
        shrink_(truth, rows, columns, 0.0, backend="reference")
        return _worst(zip(ours, truth, strict=True))

    yield "add", add
    yield "shrink", shrink


def _gather_cases(backend: str, device: str, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    weights = _weights(device, dtype)
    for dim in (0, 1):
        keep = [torch.arange(w.shape[dim]).flip(0)[::2].contiguous() for w in weights]

        def case(dim: int = dim, keep: list[Tensor] = keep) -> tuple[float, float]:
            ours = compact_filters(weights, keep, dim, backend=backend)
            truth = [w.index_select(dim, k.to(w.device)) for w, k in zip(weights, keep, strict=True)]
            return float(not all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))), 0.0

        yield f"dim={dim}", case
