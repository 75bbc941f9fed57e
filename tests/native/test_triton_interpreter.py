"""The Triton kernels in Triton's interpreter, on CPU tensors, against the op contract.

Triton decides at its first import whether it interprets, so these tests run in a process of their own: here
there is one test that starts it, with TRITON_INTERPRET=1 there are all the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:

    @pytest.mark.slow
    def test_in_a_process_of_its_own() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

else:
    import triton
    from kernel_oracle import (
        ALL_DTYPES,
        BF16,
        F32,
        F64,
        StageSpec,
        check_flow,
        check_loss_and_upstream,
        check_sums_of,
        flow_cases,
        make_problem,
    )
    from torch import Tensor

    from ffr_ext.kernels import filters, flow
    from ffr_ext.kernels import sizes as config
    from ffr_ext.regularizers.fused import add_scaled_, row_column_norms, shrink_

    # Triton 3.6 makes an int of a numpy array with one dimension, which numpy 2.4 refuses.
    pytestmark = pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
        and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
        reason=f"the interpreter of triton {triton.__version__} does not work with numpy {numpy.__version__}",
    )

    @pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
    @pytest.mark.parametrize("case", list(flow_cases(F32)))
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    def test_sums_signs_and_gradients(dtype: torch.dtype, case: str, squared: bool) -> None:
        check_flow(flow, make_problem(flow_cases(dtype)[case], squared))

    @pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_the_loss_and_its_upstream_gradient(dtype: torch.dtype, squared: bool) -> None:
        check_loss_and_upstream(flow, dtype, squared)

    @pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 66])
    def test_sums_without_signs(length: int) -> None:
        check_flow(flow, make_problem([StageSpec(length, 300)], squared=False), with_signs=False)

    @pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
    def test_sums_added_in_two_rounds(squared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(config, "ADD_PART", 4)
        monkeypatch.setattr(config, "ADD_BLOCK", 2)
        check_flow(flow, make_problem([StageSpec(3, 256 * 9 + 5), StageSpec(3, 256 * 40, 2)], squared))

    @pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-40])
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_signs_of_special_values(special: float, dtype: torch.dtype) -> None:
        if dtype == BF16 and special == 1e-40:
            pytest.skip("the interpreter reads subnormal bfloat16 as zero; the hardware does not")
        from kernel_oracle import expected_nibbles, plane_bytes, unpack_nibbles

        stage = [torch.randn(100).relu().to(dtype) for _ in range(5)]
        for i, feature in enumerate(stage):
            feature[i * 7 :: 3] = special
        signs = torch.empty(4 * plane_bytes(100), dtype=torch.uint8)
        flow.flow_forward(stage, [5], [1], False, torch.empty(7, dtype=F64), signs)
        for got, expected in zip(unpack_nibbles(signs, 5, 100), expected_nibbles(stage), strict=True):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("special", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_sums_of_special_values(special: float, dtype: torch.dtype) -> None:
        check_sums_of(special, flow, dtype)

    def test_misaligned_signs_are_refused() -> None:
        stage = [torch.zeros(8), torch.ones(8)]
        signs = torch.empty(17, dtype=torch.uint8)[1:]
        with pytest.raises(ValueError, match="signs must begin at a multiple of 16 bytes"):
            flow.flow_forward(stage, [2], [1], False, torch.empty(1, dtype=F64), signs)

    def _weights() -> tuple[list[Tensor], list[int]]:
        weights = [
            torch.randn(5, 3, 3, 3),
            torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last).to(BF16),
            torch.randn(3, 7, 3, 3).half(),
            torch.randn(6, 1, dtype=F64),
            torch.empty(2, 0, 3),  # filters without elements have norm 0
            torch.empty(0, 4),
            torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]]),
        ]
        return weights, [0, 0, 1, 0, 0, 0, 0]

    @pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_filter_norms(p: float) -> None:
        weights, dims = _weights()
        out = torch.full((sum(w.shape[d] for w, d in zip(weights, dims, strict=True)),), -1.0, dtype=F64)
        filters.filter_norms(weights, dims, p, out)
        rows: list[Any] = [w.double().movedim(d, 0).flatten(1) for w, d in zip(weights, dims, strict=True)]
        expected = [
            torch.linalg.vector_norm(r, ord=p, dim=1) if r.numel() else torch.zeros(len(r), dtype=F64)
            for r in rows
        ]
        torch.testing.assert_close(out, torch.cat(expected), rtol=1e-12, atol=0, equal_nan=True)

    def test_compact_filters() -> None:
        tensors = [
            torch.randn(6, 5, 3, 3),
            torch.randn(6, 5, 3, 3).half(),  # rows of 18 bytes: units of 2
            torch.randint(0, 100, (7, 3), dtype=torch.int8),
            torch.randn(4, 5, dtype=torch.complex128),
            torch.arange(5),
            torch.randn(3, 2),
        ]
        dims = [0, 1, 0, 1, 0, 0]
        keep = [torch.randperm(t.shape[d])[: t.shape[d] // 2] for t, d in zip(tensors, dims, strict=True)]
        keep[-1] = torch.empty(0, dtype=torch.int64)
        outs, wrong = filters.compact_filters(tensors, keep, dims)
        assert wrong == -1
        for out, tensor, dim, indices in zip(outs, tensors, dims, keep, strict=True):
            assert torch.equal(out, tensor.index_select(dim, indices))

    def _group_weights(dtype: torch.dtype) -> list[Tensor]:
        """Tiles of 16 or 128 rows and 32 accesses: less than one, whole ones, several, every order in memory."""
        made = [
            torch.randn(5, 3, 3, 3),
            torch.randn(7, 4, 3, 3).contiguous(memory_format=torch.channels_last),
            torch.randn(130, 260),
            torch.randn(140, 70).t(),
            torch.randn(3, 4, 5, 2).permute(2, 1, 3, 0),
            torch.randn(33, 1, 3, 3),
            torch.randn(1, 9, 4),
            torch.randn(4, 4, 64),
            torch.empty(3, 0, 2),
        ]
        off_a_whole_access = torch.randn(1 + 20 * 64).to(dtype)[1:].view(20, 64)
        return [*(w.to(dtype) for w in made), off_a_whole_access]

    @pytest.mark.parametrize("p", [1, 2, float("inf")])
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    def test_norms_of_rows_and_columns(dtype: torch.dtype, p: float) -> None:
        weights = _group_weights(dtype)
        weights[0][1, 2, 0, 0] = float("nan")
        truth = row_column_norms([w.double() for w in weights], p, backend="reference")
        for norms, expected in zip(row_column_norms(weights, p, backend="triton"), truth, strict=True):
            for got, wanted in zip(norms, expected, strict=True):
                assert got is not None
                assert wanted is not None
                torch.testing.assert_close(got, wanted.to(got.dtype), equal_nan=True)

    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    def test_scaling_by_rows_and_columns(dtype: torch.dtype) -> None:
        weights = [*_group_weights(dtype), torch.randn(300).to(dtype)]
        rows = [torch.randn(w.shape[0]) if i % 3 else None for i, w in enumerate(weights)]
        columns = [torch.randn(w.shape[1]) if i % 4 and w.dim() > 1 else None for i, w in enumerate(weights)]
        slopes, taus = [i / 7 for i in range(len(weights))], [i / 16 for i in range(len(weights))]
        grads = [torch.empty_like(w).copy_(torch.randn(w.shape)) for w in weights]
        wanted = [torch.empty_like(g).copy_(g) for g in grads]
        add_scaled_(grads, weights, rows, columns, slopes, taus, backend="triton")
        add_scaled_(wanted, weights, rows, columns, slopes, taus, backend="reference")
        for got, expected in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, expected)
        wanted = [torch.empty_like(w).copy_(w) for w in weights]
        shrink_(weights, rows, columns, taus, backend="triton")
        shrink_(wanted, rows, columns, taus, backend="reference")
        for got, expected in zip(weights, wanted, strict=True):
            torch.testing.assert_close(got, expected)
