"""The CUDA kernels' logic without a GPU: compiled by the host's compiler, every CUDA thread a fiber
(tests/support/cuda_on_cpu).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated_cuda import EmulatedKernels, build, compiler
from kernel_oracle import (
    ALL_DTYPES,
    BF16,
    F32,
    F64,
    StageSpec,
    check_flow,
    check_sums_of,
    flow_cases,
    make_problem,
)
from torch import Tensor

CASES = list(flow_cases(F32))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return EmulatedKernels(build(Path(tmp_path_factory.mktemp("cuda_on_cpu"))))


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sums_signs_and_gradients(
    dtype: torch.dtype, case: str, squared: bool, kernels: EmulatedKernels
) -> None:
    check_flow(kernels, make_problem(flow_cases(dtype)[case], squared))


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_blocks_of_several_tiles(dtype: torch.dtype, squared: bool, kernels: EmulatedKernels) -> None:
    check_flow(
        kernels, make_problem([StageSpec(3, 9001, 1, dtype), StageSpec(2, 8 * 2600, 2, dtype)], squared)
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sums_without_signs(dtype: torch.dtype, kernels: EmulatedKernels) -> None:
    check_flow(kernels, make_problem([StageSpec(5, 2100, 1, dtype)], squared=False), with_signs=False)


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize(
    ("stages", "forward", "backward"),
    [
        ([StageSpec(10, 8192), StageSpec(9, 4096), StageSpec(9, 2048)], 2, 1),
        ([StageSpec(64, 32)], 1, 1),  # one tile: its sums are the stage's, and there is nothing to add up
        ([StageSpec(3, 5000, 1, F32), StageSpec(3, 5000, 1, BF16), StageSpec(3, 5000, 1, F64)], 4, 3),
        ([StageSpec(2, 40)] * 20, 2, 2),
    ],
    ids=[
        "a network is one launch and the sums",
        "64 features are one launch",
        "one launch per dtype",
        "16 pieces",
    ],
)
def test_number_of_launches(
    stages: list[StageSpec], forward: int, backward: int, squared: bool, kernels: EmulatedKernels
) -> None:
    problem = make_problem(stages, squared)
    flat = [f for stage in problem.features for f in stage]
    stats, coef = torch.cat(problem.coef), torch.cat(problem.coef)
    signs = torch.zeros(0 if squared else 1 << 20, dtype=torch.uint8)
    lengths, numels, groups = (
        [s.length for s in stages],
        [s.numel for s in stages],
        [s.groups for s in stages],
    )
    kernels.flow_forward(flat, lengths, groups, squared, stats, signs)
    assert kernels.launches == forward
    kernels.flow_backward(flat if squared else [], signs, coef, lengths, numels, groups, squared, flat)
    assert kernels.launches == backward


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize(
    "stages",
    [
        [StageSpec(300, 20)],  # several pieces of one stage
        [StageSpec(100, 16)] * 4,  # more pointers than a launch carries
        [StageSpec(2 + i % 3, 10 + i) for i in range(40)],  # more pieces than a launch carries
        [StageSpec(4, 96, 4, F32), StageSpec(5, 33, 3, BF16), StageSpec(3, 50, 1, F64)],
    ],
    ids=["300 features", "400 pointers", "40 stages", "mixed dtypes and groups"],
)
def test_more_than_one_launch_holds(stages: list[StageSpec], squared: bool, kernels: EmulatedKernels) -> None:
    check_flow(kernels, make_problem(stages, squared))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_signs_of_special_values(special: float, dtype: torch.dtype, kernels: EmulatedKernels) -> None:
    from kernel_oracle import expected_nibbles, plane_bytes, unpack_nibbles

    stage = [torch.randn(100).relu().to(dtype) for _ in range(5)]
    for i, feature in enumerate(stage):
        feature[i * 7 :: 3] = special
    stats = torch.empty(7, dtype=F64)
    signs = torch.empty(4 * plane_bytes(100), dtype=torch.uint8)
    kernels.flow_forward(stage, [5], [1], False, stats, signs)
    for got, expected in zip(unpack_nibbles(signs, 5, 100), expected_nibbles(stage), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sums_of_special_values(special: float, dtype: torch.dtype, kernels: EmulatedKernels) -> None:
    check_sums_of(special, kernels, dtype)


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_filter_norms(p: float, kernels: EmulatedKernels) -> None:
    weights = [
        torch.randn(5, 3, 3, 3),
        torch.randn(4, 600).to(BF16),  # more inner elements than threads
        torch.randn(3, 7, 3, 3).half(),
        torch.randn(6, dtype=F64),
        torch.empty(2, 0, 3),  # filters without elements have norm 0
        torch.empty(0, 4),
        torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]),
    ]
    dims = [0, 0, 1, 0, 0, 0, 0]
    out = torch.full((sum(w.shape[d] for w, d in zip(weights, dims, strict=True)),), -1.0, dtype=F64)
    kernels.filter_norms(weights, dims, p, out)
    assert kernels.launches == 1
    expected = [
        torch.linalg.vector_norm(w.double().movedim(d, 0).flatten(1), ord=p, dim=1)
        if w.numel() and w.dim() > 1
        else w.double().abs() if w.numel() else torch.zeros(w.shape[d], dtype=F64)
        for w, d in zip(weights, dims, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-12, atol=0, equal_nan=True)


def test_compact_filters(kernels: EmulatedKernels) -> None:
    tensors: list[Tensor] = [
        torch.randn(6, 5, 3, 3),
        torch.randn(6, 5, 3, 3).half(),  # rows of 18 bytes: units of 2
        torch.randn(9, 4, 16),  # rows of 64 bytes: units of 16
        torch.randint(0, 100, (7, 3), dtype=torch.int8),
        torch.randn(4, 5, dtype=torch.complex128),
        torch.arange(5),
        torch.randn(33, 40)[1:].clone()[:, :40],
        torch.randn(3, 2),
    ]
    dims = [0, 1, 0, 0, 1, 0, 0, 0]
    keep = [torch.randperm(t.shape[d])[: max(t.shape[d] // 2, 1)] for t, d in zip(tensors, dims, strict=True)]
    keep[-1] = torch.empty(0, dtype=torch.int64)
    outs = [torch.zeros_like(t.index_select(d, k)) for t, d, k in zip(tensors, dims, keep, strict=True)]
    kernels.compact_filters(tensors, keep, dims, outs)
    assert kernels.launches == 1
    for out, tensor, dim, indices in zip(outs, tensors, dims, keep, strict=True):
        assert torch.equal(out, tensor.index_select(dim, indices))
