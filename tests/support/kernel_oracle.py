"""What the kernels must compute, for every implementation of the op contract (docs/design.md, section 5).

`check_flow` takes the three loss kernels of one implementation and compares everything they write with
float64, bit by bit where the contract names bits: sums, packed signs, gradients, what must stay untouched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

GUARD = 16  # elements around every tensor that must be neither read (they are NaN) nor written


class FlowKernels(Protocol):
    flow_forward: Callable[..., Any]
    flow_backward: Callable[..., Any]
    flow_backward_at: Callable[..., Any]


class StageSpec(NamedTuple):
    length: int
    numel: int
    groups: int = 1
    dtype: torch.dtype = torch.float32
    offset: int = 0  # elements past an aligned address


class Problem(NamedTuple):
    stages: list[StageSpec]
    features: list[list[Tensor]]
    coef: list[Tensor]
    squared: bool


def guarded(values: Tensor, offset: int = 0, fill: float = float("nan")) -> Tensor:
    """A view of `values`, `offset` elements past a 16-byte boundary, with `fill` before and behind."""
    buffer = torch.full(
        (values.numel() + 2 * GUARD + offset,), fill, dtype=values.dtype, device=values.device
    )
    view = buffer[GUARD + offset :][: values.numel()]
    return view.copy_(values)


def assert_guard_intact(view: Tensor, fill: float = float("nan")) -> None:
    buffer = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    begin = view.storage_offset()
    outside = torch.cat([buffer[:begin], buffer[begin + view.numel() :]])
    expected = torch.full_like(outside, fill)
    torch.testing.assert_close(
        outside, expected, rtol=0, atol=0, equal_nan=True, msg="wrote outside of its tensor"
    )


def make_problem(stages: Sequence[StageSpec], squared: bool, device: str = "cpu") -> Problem:
    """Features after a ReLU rounded to quarters for every second element (ties, zeros), Gaussian for the
    others.
    """
    features, coef = [], []
    for spec in stages:
        stage = []
        for _ in range(spec.length):
            x = torch.randn(spec.numel, dtype=torch.float64)
            x[::2] = (x[::2].relu() * 4).round() / 4
            stage.append(guarded(x.to(device, spec.dtype), spec.offset))
        features.append(stage)
        entries = max(2 * spec.length - 3, 0) * spec.groups
        coef.append(torch.randn(entries, dtype=torch.float64, device=device))
    return Problem(list(stages), features, coef, squared)


def plane_bytes(numel: int) -> int:
    return 16 * ((numel + 31) // 32)


def differences(stage: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """d and c in compute precision: fp32, or fp64 for fp64."""
    x = [f.to(torch.float64 if f.dtype == torch.float64 else torch.float32) for f in stage]
    d = [after - before for before, after in itertools.pairwise(x)]
    return d, [after - before for before, after in itertools.pairwise(d)]


def expected_stats(stage: Sequence[Tensor], spec: StageSpec, squared: bool) -> Tensor:
    d, c = differences(stage)
    measure = torch.square if squared else torch.abs
    rows = [measure(v.double()).view(spec.groups, -1).sum(1) for v in d + c]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.float64, device=stage[0].device)


def expected_nibbles(stage: Sequence[Tensor]) -> list[Tensor]:
    d, c = differences(stage)
    code = lambda v: (v > 0).int() + 2 * (v < 0).int()  # noqa: E731
    return [code(v) + (4 * code(c[l]) if l < len(c) else 0) for l, v in enumerate(d)]  # noqa: E741


def unpack_nibbles(signs: Tensor, length: int, numel: int) -> list[Tensor]:
    planes = signs.view(length - 1, plane_bytes(numel)).int()
    return [torch.stack([plane & 15, plane >> 4], 1).flatten()[:numel] for plane in planes]


def expected_grads(
    stage: Sequence[Tensor], spec: StageSpec, coef: Tensor, squared: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients in float64, and the sum of the magnitudes of the addends of each element."""
    d, c = differences(stage)
    s, t = ([2 * v.double() if squared else v.double().sign() for v in values] for values in (d, c))
    per_element = coef.view(-1, spec.groups).repeat_interleave(max(spec.numel // spec.groups, 1), dim=1)[
        :, : spec.numel
    ]
    a, e = per_element[: len(d)], per_element[len(d) :]
    grads = [torch.zeros(spec.numel, dtype=torch.float64, device=coef.device) for _ in stage]
    sizes = [torch.zeros_like(g) for g in grads]
    for index, value, factor in [
        *((i + k, a[i] * s[i], (-1, 1)[k]) for i in range(len(d)) for k in (0, 1)),
        *((i + k, e[i] * t[i], (1, -2, 1)[k]) for i in range(len(c)) for k in (0, 1, 2)),
    ]:
        grads[index] += factor * value
        sizes[index] += abs(factor) * value.abs()
    return grads, sizes


def assert_grad(grad: Tensor, truth: Tensor, size: Tensor) -> None:
    """One rounding to the dtype at the store, and the compute precision's rounding of each of up to eight
    addends.
    """
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    allowed = torch.finfo(grad.dtype).eps * truth.abs() + 8 * torch.finfo(compute).eps * size
    allowed += torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    wrong = ~((grad.double() - truth).abs() <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements, the first at {int(wrong.nonzero()[0])}: "
        f"got {grad[wrong][0].item()}, expected {truth[wrong][0].item()}"
    )


def sum_tolerance(dtype: torch.dtype) -> float:
    """Relative: a kernel adds at most some hundred elements in compute precision, the rest in fp64."""
    return 1e-13 if dtype == torch.float64 else 4e-6


def check_flow(kernels: FlowKernels, problem: Problem, with_signs: bool = True) -> None:
    """Everything the three kernels write. `with_signs=False`: the forward pass of a call that wants no
    gradient.
    """
    flat = [f for stage in problem.features for f in stage]
    device = flat[0].device
    lengths = [s.length for s in problem.stages]
    numels = [s.numel for s in problem.stages]
    groups = [s.groups for s in problem.stages]
    squared = problem.squared
    sizes = [coef.numel() for coef in problem.coef]
    sign_sizes = [max(s.length - 1, 0) * plane_bytes(s.numel) for s in problem.stages]
    stats = guarded(torch.zeros(sum(sizes), dtype=torch.float64, device=device), fill=float("nan"))
    stats.fill_(float("nan"))  # every entry must be written
    wants_signs = with_signs and not squared
    signs = guarded(
        torch.zeros(sum(sign_sizes) if wants_signs else 0, dtype=torch.uint8, device=device), fill=171
    )
    signs.fill_(171)

    kernels.flow_forward(flat, lengths, groups, squared, stats, signs)

    assert_guard_intact(stats)
    assert_guard_intact(signs, 171)
    for spec, stage, got in zip(problem.stages, problem.features, stats.split(sizes), strict=True):
        tolerance = sum_tolerance(spec.dtype)
        torch.testing.assert_close(got, expected_stats(stage, spec, squared), rtol=tolerance, atol=1e-12)
    if not squared and not wants_signs:
        return
    if not squared:
        for spec, stage, planes in zip(
            problem.stages, problem.features, signs.split(sign_sizes), strict=True
        ):
            if spec.length < 2:
                continue
            unpacked = unpack_nibbles(planes, spec.length, spec.numel)
            for got, truth in zip(unpacked, expected_nibbles(stage), strict=True):
                assert torch.equal(got, truth), "packed signs"

    coef = torch.cat(problem.coef) if problem.coef else torch.empty(0, dtype=torch.float64)
    truths = [
        expected_grads(stage, spec, c, squared)
        for spec, stage, c in zip(problem.stages, problem.features, problem.coef, strict=True)
    ]
    flat_truths = [pair for grads, bounds in truths for pair in zip(grads, bounds, strict=True)]
    offsets = [spec.offset for spec in problem.stages for _ in range(spec.length)]
    grads = [
        guarded(torch.full_like(f, float("nan")), offset)
        if i % 5 != 1
        else f.new_empty(0)  # one in five not wanted
        for i, (f, offset) in enumerate(zip(flat, offsets, strict=True))
    ]
    kernels.flow_backward(flat if squared else [], signs, coef, lengths, numels, groups, squared, grads)
    for grad, (truth, size) in zip(grads, flat_truths, strict=True):
        if grad.numel():
            assert_grad(grad, truth, size)
            assert_guard_intact(grad)

    for spec, stage, stage_signs, stage_coef, (stage_grads, bounds) in zip(
        problem.stages,
        problem.features,
        signs.split(sign_sizes) if not squared else [signs] * len(problem.stages),
        coef.split(sizes),
        truths,
        strict=True,
    ):
        # Each place relative to both ends once, and one in the middle.
        for index in sorted(
            {i for i in (0, 1, 2, spec.length // 2, spec.length - 2, spec.length - 1) if 0 <= i < spec.length}
        ):
            read = (
                [f if abs(i - index) <= 2 else f.new_empty(0) for i, f in enumerate(stage)] if squared else []
            )
            for accumulate in (False, True):
                grad = guarded(
                    torch.ones_like(stage[0]) if accumulate else torch.full_like(stage[0], float("nan")),
                    spec.offset,
                )
                kernels.flow_backward_at(
                    read,
                    stage_signs,
                    stage_coef,
                    spec.length,
                    spec.numel,
                    spec.groups,
                    squared,
                    index,
                    grad,
                    accumulate,
                )
                added = 1.0 if accumulate else 0.0
                assert_grad(grad, stage_grads[index] + added, bounds[index] + added)
                assert_guard_intact(grad)


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ALL_DTYPES = [F64, F32, BF16, F16]


def flow_cases(dtype: torch.dtype) -> dict[str, list[StageSpec]]:
    """Stage lists small enough for an interpreter. A vector is 16 bytes: 2, 4 or 8 elements."""
    S = lambda *a, **k: StageSpec(*a, **{"dtype": dtype, **k})  # noqa: E731
    return {
        "one element": [S(2, 1)],
        "two features have no c": [S(2, 40)],
        "three features, less than a warp": [S(3, 33)],
        "whole vectors only": [S(4, 512)],
        "a tail of single elements behind whole vectors": [S(5, 1029)],
        "several tiles with a tail": [S(6, 1500)],
        "every pointer misaligned": [S(5, 777, offset=1)],
        "groups that begin at whole vectors": [S(4, 3 * 160, groups=3)],
        "groups that begin anywhere": [S(4, 5 * 37, groups=5)],
        "a group per element": [S(3, 6, groups=6)],
        "stages of other shapes, and features in no term": [S(3, 70), S(1, 9), S(2, 300), S(4, 32), S(1, 8)],
        "an empty stage among others": [S(3, 0), S(3, 17)],
        "longer than one piece of the Triton kernels": [S(70, 24)],
    }


def check_sums_of(special: float, kernels: FlowKernels, dtype: torch.dtype, device: str = "cpu") -> None:
    """A value that is not finite gets into the sums of its group, of squares and absolute values, and no others."""
    spec = StageSpec(length=5, numel=3 * 130, groups=3, dtype=dtype)
    for squared, place in itertools.product((False, True), (0, 2, 4)):
        features = make_problem([spec], squared, device).features[0]
        features[place][130 + 77] = special
        stats = torch.zeros(7 * 3, dtype=torch.float64, device=device)
        kernels.flow_forward(
            features, [5], [3], squared, stats, torch.empty(0, dtype=torch.uint8, device=device)
        )
        expected = expected_stats(features, spec, squared)
        assert torch.equal(stats.isnan(), expected.isnan())
        assert torch.equal(stats.isinf(), expected.isinf())
        assert not stats.isfinite().all()


def check_loss_and_upstream(
    kernels: FlowKernels, dtype: torch.dtype, squared: bool, device: str = "cpu"
) -> None:
    """The weighted sum of stats that a forward call makes where it is asked to, and a backward call whose coefficients
    are multiplied by one number: what separate operators make of the same stats and coefficients."""
    problem = make_problem([StageSpec(5, 300, 3, F32), StageSpec(2, 64)], squared, device)
    flat = [f for stage in problem.features for f in stage]
    shape = [5, 2], [300, 64], [3, 1]
    lengths, _, groups = shape
    coef = torch.cat(problem.coef)
    stats, wanted = torch.empty_like(coef), 0 if squared else 4 * plane_bytes(300) + plane_bytes(64)
    signs = torch.empty(wanted, dtype=torch.uint8, device=device)
    loss = torch.full((), float("nan"), dtype=dtype, device=device)
    kernels.flow_forward(flat, lengths, groups, squared, stats, signs, coef, loss)
    alone = torch.empty_like(stats)
    kernels.flow_forward(flat, lengths, groups, squared, alone, signs)
    assert torch.equal(stats, alone)
    size = (stats * coef).abs().sum()
    assert (loss.double() - (stats * coef).sum()).abs() <= torch.finfo(dtype).eps * loss.abs() + 1e-15 * size

    upstream = torch.tensor(-0.3, dtype=dtype, device=device)
    read = flat if squared else []
    results = []
    for arguments in ((coef * upstream, None), (coef, upstream)):
        grads = [torch.empty_like(f) for f in flat]
        kernels.flow_backward(read, signs, arguments[0], *shape, squared, grads, arguments[1])
        results.append(grads)
    for separate, together in zip(*results, strict=True):
        assert torch.equal(separate, together)
    nothing = torch.empty(0, dtype=F64, device=device)
    kernels.flow_forward([], [], [], True, nothing, signs[:0], nothing, loss)
    assert loss == 0, "a sum of nothing"
