"""The CUDA and Triton kernels on a GPU: results, streams, graphs, sizes past 32 bits, devices, repeatability."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    assert_no_worse_than_torch,
    features_with_ties,
    loss_and_grads,
    random_features,
    reference_in,
)
from kernel_oracle import (
    ALL_DTYPES,
    F32,
    F64,
    StageSpec,
    check_flow,
    check_loss_and_upstream,
    expected_nibbles,
    flow_cases,
    make_problem,
    plane_bytes,
    unpack_nibbles,
)
from torch import Tensor

from ffr_ext import backends, compact_filters, ffr_loss, filter_norms, ops

pytestmark = pytest.mark.gpu
NORMS: list[dict[str, Any]] = [
    {"norm": "l1"},
    {"norm": "l2_squared"},
    {"norm": "l2"},
    {"norm": "l2", "curvature_kind": "angle"},
]
SHAPES = [(4, 16, 8, 8)] * 4 + [(4, 32, 4, 4)] * 3


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    status = backends.available()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param!r}: {status.reason}")
    return str(request.param)


@pytest.fixture
def kernels(backend: str) -> Any:
    forward, backward, backward_at = ops.FLOW_KERNELS[backend]
    return SimpleNamespace(flow_forward=forward, flow_backward=backward, flow_backward_at=backward_at)


def on_gpu(features: list[Tensor]) -> list[Tensor]:
    return [f.detach().cuda().requires_grad_(f.requires_grad) for f in features]


# -------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("case", list(flow_cases(F32)))
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sums_signs_and_gradients(dtype: torch.dtype, case: str, squared: bool, kernels: Any) -> None:
    check_flow(kernels, make_problem(flow_cases(dtype)[case], squared, "cuda"))


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_the_loss_and_its_upstream_gradient(dtype: torch.dtype, squared: bool, kernels: Any) -> None:
    check_loss_and_upstream(kernels, dtype, squared, "cuda")


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_sizes_that_fill_the_gpu(dtype: torch.dtype, squared: bool, kernels: Any) -> None:
    """Several tiles per block, several parts of the slots; a tail; groups."""
    stages = [
        StageSpec(5, 3_000_001, 1, dtype),
        StageSpec(3, 64 * 40_000, 64, dtype),
        StageSpec(130, 999, 1, dtype),
    ]
    check_flow(kernels, make_problem(stages, squared, "cuda"))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_signs_of_special_values(special: float, dtype: torch.dtype, kernels: Any) -> None:
    stage = [torch.randn(1000).relu().to(dtype) for _ in range(5)]
    for i, feature in enumerate(stage):
        feature[i * 7 :: 3] = special
    signs = torch.empty(4 * plane_bytes(1000), dtype=torch.uint8, device="cuda")
    stats = torch.empty(7, dtype=F64, device="cuda")
    kernels.flow_forward([f.cuda() for f in stage], [5], [1], False, stats, signs)
    for got, expected in zip(unpack_nibbles(signs.cpu(), 5, 1000), expected_nibbles(stage), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("make", [random_features, features_with_ties])
def test_loss_and_gradients(
    make: Callable[..., list[Tensor]], dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    features = on_gpu(make(*SHAPES, dtype=dtype))
    assert_no_worse_than_torch(features, upstream=3.0, backend=backend, **options)


def test_channels_last_gradients_keep_their_strides(backend: str) -> None:
    features = [f.contiguous(memory_format=torch.channels_last) for f in on_gpu(random_features(*SHAPES))]
    features = [f.detach().requires_grad_() for f in features]
    _, grads = loss_and_grads(features, backend=backend)
    for feature, grad in zip(features, grads, strict=True):
        assert grad is not None
        assert grad.stride() == feature.stride()


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_filter_norms(p: float, backend: str) -> None:
    weights = [
        torch.randn(s, device="cuda", dtype=d) for s in ((8, 3, 3, 3), (5, 700), (4,)) for d in ALL_DTYPES
    ]
    for got, weight in zip(filter_norms(weights, p, backend=backend), weights, strict=True):
        expected = torch.linalg.vector_norm(weight.double().reshape(len(weight), -1), ord=p, dim=1)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_compact_filters(backend: str) -> None:
    tensors = [torch.randn(16, 6, 3, 3, device="cuda").to(d) for d in (*ALL_DTYPES, torch.int8, torch.int64)]
    keep = [torch.randperm(16, device="cuda")[:9] for _ in tensors]
    for got, tensor, indices in zip(
        compact_filters(tensors, keep, backend=backend), tensors, keep, strict=True
    ):
        assert torch.equal(got, tensor.index_select(0, indices))


# -------------------------------------------------------------------------------------- streams, graphs, syncs


def test_side_stream_with_a_delayed_producer(backend: str) -> None:
    """The kernels run on the current stream: on another they would read what is not written yet."""
    truth = random_features(*SHAPES)
    expected = reference_in(F64, truth)
    features = [torch.zeros_like(f, device="cuda").requires_grad_() for f in truth]
    values = [f.detach().cuda() for f in truth]
    ffr_loss(features, backend=backend).backward()  # compiled before the race
    for feature in features:
        feature.grad = None
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        with torch.no_grad():
            for feature, value in zip(features, values, strict=True):
                feature.copy_(value)
        loss = ffr_loss(features, backend=backend)
        loss.backward()
    stream.synchronize()
    torch.testing.assert_close(loss.cpu().double(), expected.loss, rtol=1e-5, atol=0)
    for feature, grad in zip(features, expected.grads, strict=True):
        torch.testing.assert_close(feature.grad.cpu().double(), grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(o.values()))
def test_cuda_graph_replays_with_new_values(options: dict[str, Any], backend: str) -> None:
    features = on_gpu(random_features(*SHAPES))

    def step() -> tuple[Tensor, ...]:
        loss = ffr_loss(features, backend=backend, **options)
        return (loss.detach(), *torch.autograd.grad(loss, features))

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for feature in features:
                feature.normal_()
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


def test_cuda_graph_with_weights_that_no_call_had_before(backend: str) -> None:
    """A schedule may change them between the warm-up and the capture."""
    features = on_gpu(random_features(*SHAPES))
    for weight in (0.25, [0.1, 0.2, 0.3, 0.4, 0.5]):
        ffr_loss(features, gradient=3.0, backend=backend).backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ffr_loss(features, gradient=weight, backend=backend).detach()
        expected = ffr_loss(features, gradient=weight, backend=backend)
        graph.replay()
        assert torch.equal(captured, expected)
        torch.testing.assert_close(
            expected, ffr_loss(features, gradient=weight, backend="reference"), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(o.values()))
def test_nothing_waits_for_the_gpu(options: dict[str, Any], backend: str) -> None:
    features = on_gpu(random_features(*SHAPES))
    weights = torch.rand(5, device="cuda")
    ffr_loss(features, gradient=weights, backend=backend, **options).backward()  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ffr_loss(features, gradient=weights, backend=backend, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(o.values()))
def test_a_hundred_runs_are_bit_identical(options: dict[str, Any], backend: str) -> None:
    features = on_gpu(random_features(*[(8, 64, 33, 33)] * 5))
    first = loss_and_grads(features, backend=backend, **options)
    for _ in range(99):
        again = loss_and_grads(features, backend=backend, **options)
        assert torch.equal(again.loss, first.loss)
        assert all(torch.equal(a, b) for a, b in zip(again.grads, first.grads, strict=True))


# -------------------------------------------------------------------------------------- sizes and devices


@pytest.mark.parametrize("options", [{"norm": "l1"}, {"norm": "l2_squared"}], ids=lambda o: o["norm"])
def test_features_of_more_than_two_to_the_31_elements(options: dict[str, Any], backend: str) -> None:
    numel = 2**31 + 1024
    need = numel * (3 * 2 + 3 * 2 + 1) + (2 << 30)  # features, gradients, signs, scratch
    free = torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"needs {need >> 30} GiB of GPU memory, {free >> 30} are free")
    features = [
        torch.zeros(1, numel, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)
    ]
    marks = [0, 12345, 2**31 - 1, 2**31, numel - 1]
    with torch.no_grad():
        features[1][0, marks] = 1.0  # d is 1 and -1 there, c is -2
    loss = ffr_loss(features, gradient=1.0, curvature=0.5, reduction="sum", backend=backend, **options)
    # l1: |1| + |-1| + 0.5 |-2| a mark; squared: 1 + 1 + 0.5 * 4
    per_mark = 3.0 if options["norm"] == "l1" else 4.0
    assert loss.item() == per_mark * len(marks)
    loss.backward()
    # d loss / d x1: 1 + 1 + 0.5 * 2 for l1; 2 + 2 + 0.5 * (2 * -2) * -2 squared. x0 and x2 get -1 - 0.5 and
    # -2 - 2.
    middle, outer = (3.0, -1.5) if options["norm"] == "l1" else (8.0, -4.0)
    for feature, expected in zip(features, (outer, middle, outer), strict=True):
        assert feature.grad[0, marks].tolist() == [expected] * len(marks)
        assert int((feature.grad != 0).sum()) == len(marks)


def test_tensors_on_another_than_the_current_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    truth = random_features(*SHAPES)
    expected = reference_in(F64, truth)
    features = [f.detach().to("cuda:1").requires_grad_() for f in truth]
    assert torch.cuda.current_device() == 0
    loss, grads = loss_and_grads(features, backend=backend)
    torch.testing.assert_close(loss.cpu().double(), expected.loss, rtol=1e-5, atol=0)
    for got, grad in zip(grads, expected.grads, strict=True):
        torch.testing.assert_close(got.cpu().double(), grad, rtol=1e-5, atol=1e-9)
    assert torch.cuda.current_device() == 0


# -------------------------------------------------------------------------------------- with the rest of torch


@pytest.mark.parametrize("options", NORMS, ids=lambda o: "-".join(o.values()))
def test_compiled_with_inductor(options: dict[str, Any], backend: str) -> None:
    features = on_gpu(random_features(*SHAPES))

    def loss_of(xs: list[Tensor]) -> Tensor:
        return ffr_loss([x.relu() * 2 for x in xs], backend=backend, **options)

    compiled = torch.compile(loss_of, fullgraph=True)
    expected = loss_of(features)
    expected_grads = torch.autograd.grad(expected, features)
    got = compiled(features)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(got, features), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", NORMS[:3], ids=lambda o: "-".join(o.values()))
def test_grad_scaler_skips_a_step_with_an_injected_inf(options: dict[str, Any], backend: str) -> None:
    """An infinite loss must reach the gradients, or the scaler would not see it."""
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    stepped = []
    for inject in (False, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cuda", dtype=torch.float16):
            x = torch.randn(8, 32, device="cuda")
            features = []
            for layer in model:
                x = layer(x)
                features.append(x)
            loss = ffr_loss(features, backend=backend, **options)
        if inject:
            loss = loss * float("inf")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    assert stepped == [True, False, True]
    assert scaler.get_scale() == 512.0


def test_auto_prefers_the_cuda_kernels() -> None:
    available = backends.available()
    if not (available["cuda"].available or available["triton"].available):
        pytest.skip("neither kernel is available")
    expected = "cuda" if available["cuda"].available else "triton"
    assert backends.resolve("auto", "cuda") == expected
