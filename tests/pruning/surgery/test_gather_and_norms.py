"""`filter_norms` and `compact_filters`: equal to plain torch for every backend here, and careful about their
arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ffr_ext import compact_filters, filter_norms

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def weights(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        torch.randn(8, 4, 3, 3).to(dtype),  # a convolution
        torch.randn(6, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(5, 7).to(dtype),  # a linear layer
        torch.randn(7, 5).to(dtype).t(),  # strides not in the order of the dimensions
        torch.randn(10, 9, 1, 1).to(dtype)[::2],  # not dense: must be copied, correctly
        torch.randn(3, 2, 1, 1, 1).to(dtype),
        torch.randn(1, 1).to(dtype),
    ]


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_equal_vector_norm(backend: str, p: float, dim: int, dtype: torch.dtype) -> None:
    listed = weights(dtype)
    for weight, norms in zip(listed, filter_norms(listed, p, dim, backend=backend), strict=True):
        rest = [d for d in range(weight.dim()) if d != dim % weight.dim()]
        expected = torch.linalg.vector_norm(weight.double(), p, dim=rest)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        torch.testing.assert_close(norms, expected.to(wanted))


def test_norms_of_odd_tensors(backend: str) -> None:
    vector, empty, no_inputs = torch.tensor([-3.0, 4.0]), torch.empty(0, 3), torch.empty(2, 0)
    got = filter_norms([vector, empty, no_inputs], backend=backend)
    assert [n.tolist() for n in got] == [[3.0, 4.0], [], [0.0, 0.0]]
    assert filter_norms([], backend=backend) == []


def test_norms_do_not_overflow_in_half(backend: str) -> None:
    """The sum of squares of 60000 is infinite in float16 and its norm over 4 elements is not representable
    either."""
    assert (
        filter_norms([torch.full((1, 4), 60000.0, dtype=torch.float16)], backend=backend)[0].item()
        == 120000.0
    )


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_gather_equals_index_select(backend: str, dim: int, dtype: torch.dtype) -> None:
    listed = [(w * 10).to(dtype) for w in weights()]
    keep = [torch.randperm(w.shape[dim])[: max(1, w.shape[dim] // 2)] for w in listed]
    for weight, index, got in zip(
        listed, keep, compact_filters(listed, keep, dim, backend=backend), strict=True
    ):
        assert got.dtype == dtype
        assert torch.equal(got, weight.index_select(dim, index))


def test_gather_keeps_the_memory_format(backend: str) -> None:
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    pointwise = torch.randn(8, 4, 1, 1).to(memory_format=torch.channels_last)
    keep = torch.tensor([6, 1])
    got, one = compact_filters([weight, pointwise], [keep, keep], backend=backend)
    assert got.stride() == (36, 1, 12, 4)
    assert one.stride() == (4, 1, 4, 4)


def test_gather_takes_a_dimension_per_tensor_and_empty_indices(backend: str) -> None:
    a, b = torch.arange(6).view(2, 3), torch.arange(4)
    none = torch.empty(0, dtype=torch.int64)
    got = compact_filters([a, b], [torch.tensor([2, 0]), none], [1, 0], backend=backend)
    assert got[0].tolist() == [[2, 0], [5, 3]]
    assert got[1].shape == (0,)
    assert not compact_filters([a.float().requires_grad_()], [none], backend=backend)[0].requires_grad


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gather_of_any_shapes(backend: str, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
    tensors = [torch.randn(s).permute(data.draw(st.permutations(range(len(s))))) for s in shapes]
    dims = [data.draw(st.integers(0, t.dim() - 1)) for t in tensors]
    keep = [
        torch.tensor(data.draw(st.lists(st.integers(0, t.shape[d] - 1), unique=True)), dtype=torch.int64)
        for t, d in zip(tensors, dims, strict=True)
    ]
    for t, k, d, got in zip(
        tensors, keep, dims, compact_filters(tensors, keep, dims, backend=backend), strict=True
    ):
        assert torch.equal(got, t.index_select(d, k))


class Recorder(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


def test_a_list_of_dense_cpu_tensors_is_one_native_call(fused: str) -> None:
    listed = [w for w in weights() if w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last)]
    keep = [torch.tensor([0])] * len(listed)
    for dim in (0, [1] * len(listed), [-1] * len(listed)):
        with Recorder() as recorder:
            compact_filters(listed, keep, dim)
        assert recorder.ops == ["ffr_ext.compact_filters.default"]


def test_meta_tensors_are_no_reason_to_return_what_nobody_wrote() -> None:
    a, k = torch.arange(12.0).reshape(3, 4), torch.tensor([0, 2])
    real, meta = compact_filters([a, a.to("meta")], [k, k])
    assert torch.equal(real, a[k])
    assert (meta.device.type, meta.shape) == ("meta", (2, 4))
    with pytest.raises((RuntimeError, NotImplementedError)):
        compact_filters([a], [k.to("meta")])
    with pytest.raises(IndexError, match="got 9"):
        compact_filters([a.to("meta")], [torch.tensor([9])])
    with pytest.raises(ValueError, match="int64"):
        compact_filters([a.to("meta")], [torch.tensor([0.0, 2.0])])


def test_iterators_are_taken_once(backend: str) -> None:
    a, k = torch.arange(12.0).reshape(3, 4)[:, ::2], torch.tensor([0, 2])
    for tensors, keep, dim in (([a], iter([k]), 0), (iter([a]), [k], [0]), ([a], [k], iter([0]))):
        (got,) = compact_filters(tensors, keep, dim, backend=backend)
        assert torch.equal(got, a[k])


def test_a_gather_of_many_megabytes_is_exact_at_every_row_length_and_offset(backend: str) -> None:
    """Large gathers are stored past the cache, whole lines at a time; rows begin and end anywhere in a line."""
    pool = torch.randint(0, 256, (48_000_000,), dtype=torch.uint8)
    rows = [(10_007, 1), (5_003, 250), (701, 2_304), (97, 18_433), (1_201, 1_001)]
    tensors = [pool[offset : offset + n * size].view(n, size) for offset, (n, size) in enumerate(rows, 1)]
    tensors.append(pool.view(2, 6, 4_000_000))
    keep = [torch.arange(t.shape[0])[t.shape[0] % 3 :: 3] for t in tensors[:-1]] + [
        torch.tensor([5, 0, 1, 4])
    ]
    dims = [0] * len(rows) + [1]
    got = compact_filters(tensors, keep, dims, backend=backend)
    assert sum(t.numel() for t in got) >= 2**25
    for t, k, d, g in zip(tensors, keep, dims, got, strict=True):
        assert torch.equal(g, t.index_select(d, k))


W = torch.zeros(4, 3)
SHARED = torch.tensor([0, 3])  # fits W only


@pytest.mark.parametrize(
    ("tensors", "keep", "dim", "error", "message"),
    [
        ([W], [torch.tensor([0, 4])], 0, IndexError, r"keep\[0\]: expected indices in \[0, 4\), got 4"),
        ([W], [torch.tensor([-1])], 0, IndexError, "got -1"),
        ([W, W], [torch.tensor([0]), torch.tensor([-1])], 0, IndexError, r"keep\[1\].*got -1"),
        ([W, W[:2]], [SHARED, SHARED], 0, IndexError, r"keep\[1\]: expected indices in \[0, 2\), got 3"),
        (
            [W, W],
            [torch.tensor([0]), torch.tensor([1, 1])],
            0,
            ValueError,
            r"keep\[1\].*unique.*1 more than once",
        ),
        ([W], [torch.tensor([0], dtype=torch.int32)], 0, ValueError, "int64"),
        ([W], [torch.tensor([[0]])], 0, ValueError, "1-D"),
        ([W], [torch.tensor([True, False, True, True])], 0, ValueError, "int64"),
        ([W], [], 0, ValueError, r"one index tensor per tensor \(1\), got 0"),
        ([W], [torch.tensor([0])], 2, ValueError, "no dimension"),
        ([W], [torch.tensor([0])], True, TypeError, "dim: expected a whole number"),
        ([W], [torch.tensor([0])], [True], TypeError, r"dim\[0\]: expected a whole number"),
        ([W], [[0, 1]], 0, TypeError, "list"),
        ([W.to_sparse()], [torch.tensor([0])], 0, TypeError, r"tensors\[0\]: expected a dense"),
        (W, [torch.tensor([0])], 0, TypeError, "one Tensor"),
        (3, [torch.tensor([0])], 0, TypeError, "tensors: expected a sequence of tensors, got int"),
        ([W], 3, 0, TypeError, "keep: expected a sequence of tensors, got int"),
    ],
)
def test_gather_refuses(tensors, keep, dim, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        compact_filters(tensors, keep, dim)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([W], 3), ValueError, "p: expected 1, 2 or inf, got 3"),
        (([W.long()],), ValueError, r"weights\[0\]: expected dtype"),
        (([W], 2, 5), ValueError, "no dimension"),
        ((W,), TypeError, "one Tensor"),
        ((3,), TypeError, "weights: expected a sequence of tensors, got int"),
        ((None,), TypeError, "weights: expected a sequence of tensors, got NoneType"),
        (([3],), TypeError, r"weights\[0\]: expected a Tensor, got int"),
        (([W], True), ValueError, "p: expected 1, 2 or inf, got True"),
        (([W], 2, "0"), TypeError, "dim: expected a whole number, or one per tensor, got '0'"),
        (([W], 2, None), TypeError, "dim: expected a whole number, or one per tensor, got None"),
        (([W], 2, True), TypeError, "dim: expected a whole number, or one per tensor, got True"),
        (([W], 2, [0.5]), TypeError, r"dim\[0\]: expected a whole number, got 0.5"),
    ],
)
def test_norms_refuse(arguments, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        filter_norms(*arguments)
