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


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_length_around_a_round_of_four_steps(
    dtype: torch.dtype, squared: bool, kernels: EmulatedKernels
) -> None:
    lengths = [*range(2, 10), 12, 125, 126, 127, 128, 129]
    check_flow(kernels, make_problem([StageSpec(length, 65, 1, dtype) for length in lengths], squared))


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_groups_of_every_number_of_warps(
    dtype: torch.dtype, offset: int, squared: bool, kernels: EmulatedKernels
) -> None:
    """The last block has fewer groups than it has room for."""
    stages = [StageSpec(4, 11 * numel, 11, dtype, offset) for numel in (1, 5, 16, 64, 200, 400)]
    stages += [StageSpec(3, 3 * 1000, 3, dtype, offset), StageSpec(5, 9 * 32, 9, dtype, offset)]
    check_flow(kernels, make_problem(stages, squared))
    check_flow(kernels, make_problem(stages, squared), with_signs=False)


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


def group_weights(dtype: torch.dtype) -> list[Tensor]:
    """Tiles of 128 rows and 32 accesses: less than one, whole ones, several, and every order in memory."""
    made = [
        torch.randn(5, 3, 3, 3),
        torch.randn(7, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(130, 600),
        torch.randn(300, 70).t(),
        torch.randn(3, 4, 5, 2).permute(2, 1, 3, 0),
        torch.randn(33, 1, 3, 3),
        torch.randn(1, 9, 4),
        torch.randn(4, 4, 64),
        torch.empty(3, 0, 2),
    ]
    off_a_whole_access = torch.randn(1 + 20 * 512).to(dtype)[1:].view(20, 512)
    return [*(w.to(dtype) for w in made), off_a_whole_access]


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_norms_of_rows_and_columns(dtype: torch.dtype, p: float, kernels: EmulatedKernels) -> None:
    weights = group_weights(dtype)
    weights[0][1, 2, 0, 0] = float("nan")
    out = torch.full((sum(w.shape[0] + w.shape[1] for w in weights),), -1.0, dtype=F64)
    kernels.row_column_norms(weights, p, out)
    assert kernels.launches == 2  # what the blocks leave is added up in one of its own
    expected = [
        torch.linalg.vector_norm(slices, p, dim=1) if w.numel() else torch.zeros(w.shape[d], dtype=F64)
        for w in weights
        for d in (0, 1)
        for slices in [(w if d == 0 else w.transpose(0, 1)).double().flatten(1)]
    ]
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_scaling_by_rows_and_columns_is_what_the_cpu_does(
    dtype: torch.dtype, kernels: EmulatedKernels
) -> None:
    from ffr_ext.regularizers.fused import add_scaled_, shrink_

    weights = [*group_weights(dtype), torch.randn(70_000, 3).to(dtype)]
    compute = F64 if dtype == F64 else F32
    nothing = torch.empty(0)
    rows = [torch.randn(w.shape[0], dtype=compute) if i % 3 else None for i, w in enumerate(weights)]
    columns = [torch.randn(w.shape[1], dtype=compute) if i % 4 else None for i, w in enumerate(weights)]
    given = [[nothing if f is None else f for f in side] for side in (rows, columns)]
    slopes, taus = [i / 7 for i in range(len(weights))], [i / 16 for i in range(len(weights))]
    grads = [torch.empty_like(w).copy_(torch.randn(w.shape)) for w in weights]
    wanted = [torch.empty_like(g).copy_(g) for g in grads]
    kernels.scale(grads, weights, *given, slopes, taus)
    assert kernels.launches == 1
    add_scaled_(wanted, weights, rows, columns, slopes, taus, backend="reference")
    for got, expected in zip(grads, wanted, strict=True):
        assert torch.equal(got, expected)
    wanted = [torch.empty_like(w).copy_(w) for w in weights]
    kernels.scale(None, weights, *given, slopes, taus)
    assert kernels.launches == 1
    shrink_(wanted, rows, columns, taus, backend="reference")
    for got, expected in zip(weights, wanted, strict=True):
        assert torch.equal(got, expected)


def test_more_weights_than_one_launch_holds(kernels: EmulatedKernels) -> None:
    weights = [torch.ones(3, 2) for _ in range(100)]
    out = torch.empty(5 * len(weights), dtype=F64)
    kernels.row_column_norms(weights, 1.0, out)
    assert kernels.launches == 4
    assert torch.equal(out, torch.tensor([2.0, 2, 2, 3, 3]).double().repeat(len(weights)))
    nothing, numbers = [torch.empty(0)] * len(weights), [float(i) for i in range(len(weights))]
    grads = [torch.zeros(3, 2) for _ in weights]
    kernels.scale(grads, weights, nothing, nothing, numbers, [1.0] * len(weights))
    assert kernels.launches == 2
    assert all(torch.equal(g, torch.full((3, 2), n)) for g, n in zip(grads, numbers, strict=True))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 9, 12, 124, 126])
@pytest.mark.parametrize("signs", [False, True], ids=["sums", "signs"])
def test_the_forward_pass_takes_a_round_for_every_four_differences(
    signs: bool, length: int, kernels: EmulatedKernels
) -> None:
    """A round for every four features began with one that has no difference, and the plane without c took one of its
    own behind a multiple of four."""
    features = [torch.randn(1024) for _ in range(length)]  # a tile: an access of each thread of a block
    planes = torch.empty((length - 1) * 512 if signs else 0, dtype=torch.uint8)
    kernels.shuffles()
    kernels.flow_forward(features, [length], [1], False, torch.empty(2 * length - 3, dtype=F64), planes)
    assert kernels.shuffles() == 256 * 9 * -(-(length - 1) // 4)


@pytest.mark.parametrize(
    ("numel", "dtype", "groups_of_a_block"),
    [
        *((1, F32, 8), (64, F32, 8), (128, F32, 8), (129, F32, 4), (512, F32, 2), (513, F32, 1)),
        *((256, BF16, 8), (257, BF16, 4), (2048, BF16, 1), (64, F64, 8), (65, F64, 4)),
    ],
)
def test_a_small_group_is_the_work_of_as_many_warps_as_it_fills(
    numel: int, dtype: torch.dtype, groups_of_a_block: int, kernels: EmulatedKernels
) -> None:
    """A block of eight warps was the work of one group, of which 64 elements fill 16 of 256 threads."""
    groups = 24
    stage = [torch.randn(groups * numel).to(dtype) for _ in range(3)]
    stats = torch.empty(3 * groups, dtype=F64)
    kernels.blocks()
    nothing = torch.empty(0, dtype=torch.uint8)
    kernels.flow_forward(stage, [3], [groups], True, stats, nothing)
    assert kernels.blocks() == groups // groups_of_a_block
    kernels.flow_backward(stage, nothing, stats, [3], [groups * numel], [groups], True, stage)
    assert kernels.blocks() == groups // groups_of_a_block
    kernels.flow_backward_at(stage, nothing, stats, 3, groups * numel, groups, True, 1, stage[1], True)
    assert kernels.blocks() == groups // groups_of_a_block


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_the_terms_it_belongs_to(
    special: float, kernels: EmulatedKernels
) -> None:
    """The gradient of one feature of squares, next to the ends: no 0 times inf of a term that does not exist."""
    for length in (2, 3, 4):
        stage = [torch.full((40,), float(i * i)) for i in range(length)]
        stage[0][3] = stage[-1][5] = special
        coef = torch.ones(2 * length - 3, dtype=F64)
        wanted = [torch.empty(40) for _ in stage]
        nothing = torch.empty(0, dtype=torch.uint8)
        kernels.flow_backward(stage, nothing, coef, [length], [40], [1], True, wanted)
        for index, expected in enumerate(wanted):
            got = torch.empty(40)
            kernels.flow_backward_at(stage, nothing, coef, length, 40, 1, True, index, got, False)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_the_gradient_of_one_feature_is_shared_out_as_the_work_of_one_feature(
    kernels: EmulatedKernels,
) -> None:
    """FFR_BACKWARD_BLOCKS is 2 here, and 8 tiles of 1024 elements are 4 for each, however long the stage."""
    for length in (2, 5, 60):
        coef, signs = (
            torch.zeros(2 * length - 3, dtype=F64),
            torch.zeros((length - 1) * 4096, dtype=torch.uint8),
        )
        kernels.blocks()
        kernels.flow_backward_at([], signs, coef, length, 8192, 1, False, 1, torch.empty(8192), False)
        assert kernels.blocks() == 2


def test_pieces_of_a_long_stage_are_shared_out_as_their_own_work(kernels: EmulatedKernels) -> None:
    """300 features are pieces of 128, 128 and 44: a block for each two tiles of the long ones, not for each one."""
    length, numel = 300, 8192
    coef = torch.zeros(2 * length - 3, dtype=F64)
    signs = torch.zeros((length - 1) * numel // 2, dtype=torch.uint8)
    kernels.blocks()
    grads = [torch.empty(numel) for _ in range(length)]
    kernels.flow_backward([], signs, coef, [length], [numel], [1], False, grads)
    # 8 tiles x 300 features / 2 blocks = 1200 a block: 9 tiles of 128 features, all 8 of 44.
    assert kernels.blocks() == 3


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
