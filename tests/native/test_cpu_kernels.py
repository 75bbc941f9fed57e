"""The CPU kernels, through torch.ops: against float64, on every instruction set, with any number of threads.

Run as a program it does the same checks on the instruction set that FFR_EXT_CPU_ISA names (it is read once per
process) and prints that name and a digest of everything the kernels wrote.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_oracle import (
    ALL_DTYPES,
    BF16,
    F16,
    F32,
    F64,
    StageSpec,
    check_flow,
    check_sums_of,
    flow_cases,
    make_problem,
    plane_bytes,
)
from torch import Tensor

from ffr_ext import backends, ops  # noqa: F401  (declares the ops)

kernels: Any = torch.ops.ffr_ext
FLOAT_DTYPES = [F16, BF16, F32]  # what is computed in fp32


@pytest.fixture(autouse=True)
def _native() -> None:
    status = backends.available()["cpu"]
    if not status.available:
        pytest.skip(f"backend 'cpu': {status.reason}")


def cpu_cases(dtype: torch.dtype) -> dict[str, list[StageSpec]]:
    """Sizes around what the drivers cut the work into; elements are counted for 4 bytes each, which makes two
    and half a tile of the others.
    """
    S = lambda *a, **k: StageSpec(*a, **{"dtype": dtype, **k})  # noqa: E731
    return {
        "one block of 32 and the element behind it": [S(3, 33)],
        "a tile of the forward pass, and one element more": [S(3, 2048), S(3, 2049)],
        "a tile of the backward pass, and one element more": [S(3, 8192), S(3, 8193)],
        "several chunks, the last one short": [S(4, 40_001)],
        "chunks inside of groups": [S(2, 3 * 40_000, groups=3)],
        "groups that share bytes of the signs, several chunks each": [S(2, 2 * 20_001, groups=2)],
        "every chunk of one stage before the first of the next": [
            S(10, 20_000),
            S(2, 70_000),
            S(1, 5),
            S(3, 7),
        ],
        "more features than a table could hold": [S(70, 100)],
    }


CASES = sorted({**flow_cases(F32), **cpu_cases(F32)})


def problem_of(case: str, dtype: torch.dtype, squared: bool) -> Any:
    return make_problem({**flow_cases(dtype), **cpu_cases(dtype)}[case], squared)


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_kernels(case: str, dtype: torch.dtype, squared: bool) -> None:
    check_flow(kernels, problem_of(case, dtype, squared))


def test_stages_of_different_dtypes_in_one_call() -> None:
    specs = [StageSpec(3, 100, dtype=dtype) for dtype in ALL_DTYPES]
    check_flow(kernels, make_problem(specs, squared=True))
    check_flow(kernels, make_problem(specs, squared=False), with_signs=False)
    check_flow(kernels, make_problem(specs, squared=False))


def test_a_million_odd_elements() -> None:
    """1,000,003 is prime: no tile, chunk or block ends with it."""
    check_flow(kernels, make_problem([StageSpec(2, 1_000_003)], squared=False))


def check_large_gradients(squared: bool) -> None:
    """Above 32 MB (from signs 64) gradients are stored past the cache, but where their memory is still to come from the
    operating system: the bits are those of one feature at a time, which are stored plainly."""
    # Whole vectors and not, samples that begin anywhere in a vector or in a byte of the signs, every dtype; the same
    # with a gradient less.
    specs = [
        StageSpec(5, 2_000_000),
        StageSpec(3, 3 * 200_001, groups=3),
        StageSpec(2, 5 * 12_345, groups=5, dtype=F64),
    ]
    specs += [StageSpec(3, 2 * 99_999, groups=2, dtype=BF16), StageSpec(4, 1_000_003, dtype=BF16)]
    specs += [StageSpec(3, 99_999, dtype=F16)]
    lengths, numels, groups = (
        [getattr(spec, name) for spec in specs] for name in ("length", "numel", "groups")
    )
    features = [[torch.randn(s.numel).to(s.dtype) for _ in range(s.length)] for s in specs]
    flat = [feature for stage in features for feature in stage]
    entries = [(2 * s.length - 3) * s.groups for s in specs]
    planes = [0 if squared else (s.length - 1) * plane_bytes(s.numel) for s in specs]
    stats, signs = torch.empty(sum(entries), dtype=F64), torch.zeros(sum(planes), dtype=torch.uint8)
    kernels.flow_forward(flat, lengths, groups, squared, stats, signs)
    coef = torch.randn_like(stats)
    for unwanted in (None, 3):
        grads = [torch.full_like(f, math.nan) for f in flat]
        grads[0] = torch.empty_like(flat[0])  # 36 MB, which malloc maps anew
        if unwanted is not None:
            grads[unwanted] = flat[unwanted].new_empty(0)
        kernels.flow_backward(flat if squared else [], signs, coef, lengths, numels, groups, squared, grads)
        rest = iter(grads)
        for s, stage, k, codes in zip(specs, features, coef.split(entries), signs.split(planes), strict=True):
            own = stage if squared else []
            for index in range(s.length):
                if not (got := next(rest)).numel():
                    continue
                want = torch.full_like(got, math.nan)
                kernels.flow_backward_at(
                    own, codes.clone(), k.clone(), s.length, s.numel, s.groups, squared, index, want, False
                )
                assert torch.equal(got, want), (s, index)


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
def test_large_gradients_are_those_of_one_feature_at_a_time(squared: bool) -> None:
    check_large_gradients(squared)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sums_of_special_values(special: float, dtype: torch.dtype) -> None:
    check_sums_of(special, kernels, dtype)


# --------------------------------------------------------------------------------------------------------------
# Everything the kernels write, for comparisons bit by bit
# --------------------------------------------------------------------------------------------------------------


def flow_outputs(specs: list[StageSpec], squared: bool) -> list[Tensor]:
    """Statistics, signs without padding, and gradients of one seeded problem."""
    torch.manual_seed(0)
    problem = make_problem(specs, squared)
    flat = [f for stage in problem.features for f in stage]
    lengths, numels, groups = ([getattr(s, name) for s in specs] for name in ("length", "numel", "groups"))
    coef = torch.cat(problem.coef)
    stats = torch.empty_like(coef)
    sizes = [(s.length - 1) * plane_bytes(s.numel) for s in specs]
    signs = torch.zeros(0 if squared else sum(sizes), dtype=torch.uint8)
    grads = [torch.empty_like(f) for f in flat]
    kernels.flow_forward(flat, lengths, groups, squared, stats, signs)
    kernels.flow_backward(flat if squared else [], signs, coef, lengths, numels, groups, squared, grads)
    planes = [
        plane[: s.numel // 2]
        for s, stage in zip(specs, signs.split(sizes) if not squared else (), strict=not squared)
        for plane in stage.view(s.length - 1, -1)
    ]
    return [stats, *planes, *grads]


def filter_outputs() -> list[Tensor]:
    """Norms of filters that lie in one run, in many short ones, and side by side."""
    torch.manual_seed(0)
    shapes: list[tuple[tuple[int, ...], int]] = [
        ((70, 1000), 0),
        ((33, 50, 3, 3), 1),
        ((300, 7), 1),
        ((9,), 0),
    ]
    weights = [torch.randn(shape).to(dtype) for dtype in ALL_DTYPES for shape, _ in shapes]
    dims = [dim for _ in ALL_DTYPES for _, dim in shapes]
    outputs = []
    for p in (1.0, 2.0, math.inf):
        out = torch.empty(sum(w.shape[d] for w, d in zip(weights, dims, strict=True)), dtype=F64)
        kernels.filter_norms(weights, dims, p, out)
        outputs.append(out)
    return outputs


def all_outputs() -> list[Tensor]:
    outputs = filter_outputs()
    for dtype in ALL_DTYPES:
        for squared in (False, True):
            specs = [
                StageSpec(7, 10_003, 1, dtype),
                StageSpec(5, 3 * 4096, 3, dtype),
                StageSpec(2, 31, 1, dtype),
            ]
            outputs += flow_outputs(specs, squared)
    return outputs


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_outputs()
        torch.set_num_threads(threads)
        together = all_outputs()
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


# --------------------------------------------------------------------------------------------------------------
# Instruction sets
# --------------------------------------------------------------------------------------------------------------

ISAS = ["default", "avx2", "avx512"]  # from the least to the most


def run_on(isa: str) -> dict[str, str]:
    """What this file says when it is run as a program on that instruction set."""
    paths = os.pathsep.join(filter(None, sys.path))  # the helpers of the tests among them
    environment = {**os.environ, "FFR_EXT_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.fixture(scope="module")
def on_default() -> dict[str, str]:
    return run_on("default")


def chosen_here() -> str:
    module = backends.native()
    assert module is not None
    isa: str = module.build_info()["cpu_isa"]
    return isa


def test_default_instructions_are_right(on_default: dict[str, str]) -> None:
    assert on_default["isa"] == "default"


@pytest.mark.parametrize("isa", ISAS[1:])
def test_wide_instructions_are_right_and_write_the_same_bits(isa: str, on_default: dict[str, str]) -> None:
    if ISAS.index(chosen_here()) < ISAS.index(isa):
        pytest.skip(f"this processor has no {isa}, or FFR_EXT_CPU_ISA forbids it")
    assert run_on(isa) == {"isa": isa, "digest": on_default["digest"]}


def check_this_instruction_set() -> dict[str, str]:
    """All cases once, every second one squared, so that each dtype meets each."""
    assert backends.native() is not None
    for i, dtype in enumerate(ALL_DTYPES):
        for j, case in enumerate(CASES):
            check_flow(kernels, problem_of(case, dtype, squared=(i + j) % 2 == 0))
    check_large_gradients(squared=False)
    check_large_gradients(squared=True)
    digest = hashlib.sha256()
    for output in all_outputs():
        digest.update((output + 0).view(torch.uint8).numpy().tobytes())  # + 0: -0 and 0 are one result
    return {"isa": chosen_here(), "digest": digest.hexdigest()}


# --------------------------------------------------------------------------------------------------------------
# Rounding, NaN, inf, ties
# --------------------------------------------------------------------------------------------------------------

LENGTH, NUMEL = 5, 4097
SIGNS_CASE = [StageSpec(LENGTH, NUMEL)]


def gradients_from_signs(signs: Tensor, coef: Tensor, dtype: torch.dtype) -> list[Tensor]:
    grads = [torch.empty(NUMEL, dtype=dtype) for _ in range(LENGTH)]
    kernels.flow_backward([], signs, coef, [LENGTH], [NUMEL], [1], False, grads)
    return grads


def random_signs() -> Tensor:
    """Every pair of codes 0, 1, 2, in all planes."""
    codes = torch.tensor([s | t << 2 for s in range(3) for t in range(3)], dtype=torch.uint8)
    low, high = (codes[torch.randint(9, ((LENGTH - 1) * plane_bytes(NUMEL),))] for _ in range(2))
    return low | high << 4


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_a_gradient_is_rounded_once_at_the_store(dtype: torch.dtype) -> None:
    signs, coef = random_signs(), torch.randn(2 * LENGTH - 3, dtype=F64)
    for exact, stored in zip(
        gradients_from_signs(signs, coef, F32), gradients_from_signs(signs, coef, dtype), strict=True
    ):
        assert torch.equal(exact.to(dtype), stored)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_an_added_gradient_is_rounded_once_too(dtype: torch.dtype) -> None:
    signs, coef = random_signs(), torch.randn(2 * LENGTH - 3, dtype=F64)
    for index, exact in enumerate(gradients_from_signs(signs, coef, F32)):
        before = torch.randn(NUMEL).to(dtype)
        grad = before.clone()
        kernels.flow_backward_at([], signs, coef, LENGTH, NUMEL, 1, False, index, grad, True)
        assert torch.equal(grad, (before.float() + exact).to(dtype))


@pytest.mark.parametrize("value", [65504.0, 65519.0, 65520.0, 1e6, 6e-8, 2e-8, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_gradients_at_the_ends_of_the_range_round_as_torch_rounds(value: float, dtype: torch.dtype) -> None:
    """Largest half, what still rounds to it, what overflows, subnormals, and what is no number."""
    signs = torch.full((plane_bytes(40),), 0x21, dtype=torch.uint8)  # positive, negative, ...
    grads = [torch.empty(40, dtype=dtype) for _ in range(2)]
    kernels.flow_backward([], signs, torch.tensor([value], dtype=F64), [2], [40], [1], False, grads)
    expected = torch.tensor([value, -value] * 20).to(dtype)
    torch.testing.assert_close(grads[1], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grads[0], -expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("payload", [1, 0x7FFFFFFFFFFFF, 0xFFFFFFFFFFFFF])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_nan_among_the_coefficients_stays_one(dtype: torch.dtype, payload: int) -> None:
    """Rounded as a number, a NaN with its low bits set would become infinity or zero."""
    coef = torch.tensor([0x7FF0000000000000 | payload]).view(F64)
    assert coef.isnan().all()
    features = [torch.randn(40).to(dtype) for _ in range(2)]
    signs = torch.full((plane_bytes(40),), 0x21, dtype=torch.uint8)
    for squared in (False, True):
        grads = [torch.zeros(40, dtype=dtype) for _ in range(2)]
        given, saved = (features, signs[:0]) if squared else ([], signs)
        kernels.flow_backward(given, saved, coef, [2], [40], [1], squared, grads)
        assert all(grad.isnan().all() for grad in grads)
        kernels.flow_backward_at(given, saved, coef, 2, 40, 1, squared, 1, grads[1].zero_(), True)
        assert grads[1].isnan().all()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_equal_coefficients_cancel_exactly_where_the_flow_goes_straight_on(dtype: torch.dtype) -> None:
    """d > 0 and c > 0 everywhere: a - a and e - 2 e + e, for coefficients whose sums would not be exact."""
    stage = [torch.full((50,), 2.0**l, dtype=dtype) for l in range(6)]  # noqa: E741
    signs, stats = torch.empty(5 * plane_bytes(50), dtype=torch.uint8), torch.empty(9, dtype=F64)
    kernels.flow_forward(stage, [6], [1], False, stats, signs)
    coef = torch.tensor([0.1] * 5 + [0.7] * 4, dtype=F64)
    grads = [torch.empty_like(x) for x in stage]
    kernels.flow_backward([], signs, coef, [6], [50], [1], False, grads)
    assert all(grad.count_nonzero() == 0 for grad in grads[2:4])
    assert all(grad.count_nonzero() == 50 for grad in grads[:2] + grads[4:])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_nan_and_inf_reach_the_sums_and_the_right_gradients(dtype: torch.dtype) -> None:
    """l1: sign(NaN) = 0, as torch.sign. Squares: NaN and inf where torch has them, also at both ends of a flow."""
    stage = [torch.randn(70).to(dtype) for _ in range(5)]
    stage[2][3], stage[0][40], stage[4][69] = math.nan, math.inf, -math.inf
    leaves = [x.clone().requires_grad_() for x in stage]
    d = [b - a for a, b in pairwise(leaves)]
    c = [b - a for a, b in pairwise(d)]
    for squared, measure in ((False, torch.abs), (True, torch.square)):
        rows = [measure(v).sum() for v in d + c]
        truths = torch.autograd.grad(sum(rows[1:], rows[0]), leaves, retain_graph=True)
        signs = torch.empty(0 if squared else 4 * plane_bytes(70), dtype=torch.uint8)
        stats, grads = torch.empty(7, dtype=F64), [torch.empty_like(x) for x in stage]
        kernels.flow_forward(stage, [5], [1], squared, stats, signs)
        kernels.flow_backward(
            stage if squared else [], signs, torch.ones(7, dtype=F64), [5], [70], [1], squared, grads
        )
        assert torch.equal(stats.isnan(), torch.stack(rows).isnan())
        assert torch.equal(stats.isinf(), torch.stack(rows).isinf())
        for grad, truth in zip(grads, truths, strict=True):
            tolerance = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(grad, truth, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((6, 500), 0), ((500, 6), 1), ((6, 6, 3, 3), 1), ((6,), 0)],
    ids=["one run", "side by side", "many short runs", "one element"],
)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_norm_takes_nan_and_inf_in(dtype: torch.dtype, shape: tuple[int, ...], dim: int, p: float) -> None:
    """NaN first, in the middle and last among the elements of a filter; NaN wins over inf."""
    weight = torch.randn(shape).to(dtype)
    filters = weight.movedim(dim, 0)  # a view
    for filter_, place in ((0, 0), (1, -1), (4, 0), (4, -1)):
        filters[(filter_, *[place] * (weight.dim() - 1))] = math.nan
    filters[2].fill_(math.nan)
    filters[3].fill_(math.inf)
    out = torch.empty(6, dtype=F64)
    kernels.filter_norms([weight], [dim], p, out)
    rows = weight.movedim(dim, 0).reshape(6, -1).double()
    torch.testing.assert_close(
        out, torch.linalg.vector_norm(rows, p, dim=1), rtol=1e-13, atol=0, equal_nan=True
    )


if __name__ == "__main__":
    print(json.dumps(check_this_instruction_set()))
