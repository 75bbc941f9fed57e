"""Gradients just in time: the numbers of `ffr_loss`, made one at a time, in every kind of backward pass."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from flow_models import ResidualNet, assert_gradients_close, expected, gradients, images, task_loss
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss, pending, reference, taps

pytestmark = pytest.mark.usefixtures("fused")


@pytest.fixture(params=["apart", "in place"], autouse=True)
def _addition(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds whether autograd adds the penalty's gradients or the kernel does."""
    monkeypatch.setattr(taps, "MIN_BYTES", 0 if request.param == "in place" else 1 << 60)


class Scale(nn.Module):
    """tanh(x * weight + bias) in any dtype and layout; `change` is applied to the result."""

    def __init__(self, channels: int, dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels).to(dtype))
        self.bias = nn.Parameter(torch.randn(channels).to(dtype))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return self.change(torch.tanh(x * self.weight.view(shape) + self.bias.view(shape)))


class Chain(nn.Module):
    """Scales one after another; the features are their outputs."""

    def __init__(
        self,
        depth: int = 5,
        channels: int = 3,
        dtype: torch.dtype = torch.float64,
        change: Callable[[int, Tensor], Tensor] = lambda _index, x: x,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Scale(channels, dtype, lambda x, index=index: change(index, x)) for index in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]

    def features(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features


def flow_of(model: Any, **options: Any) -> FeatureFlow:
    return FeatureFlow(model, model.layers, backend="cpu", **options)


def tapped(model: Chain, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The penalty and the gradients of task + penalty, just in time."""
    with flow_of(model, **options) as flow:
        task = model(x).double().sum()
        penalty = flow.loss()
        assert "Collect" in graph_nodes(penalty), "the plain node was used: this test would prove nothing"
        return penalty.detach(), gradients(model, task + penalty)


def by_hand(model: Chain, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The same with one ffr_loss node over features returned by hand."""
    features = model.features(x)
    penalty = ffr_loss(features, backend="cpu", **options)
    return penalty.detach(), gradients(model, features[-1].double().sum() + penalty)


def graph_nodes(loss: Tensor) -> set[str]:
    """Class names, without "Backward", of the nodes behind a loss."""
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [following for following, _ in node.next_functions]
    return {node.name().removesuffix("Backward") for node in seen}


# --- the numbers ----------------------------------------------------------------------------------

PER_TERM = {"gradient": [1.0, 0.0, -2.0, 0.5], "curvature": torch.tensor([3.0, 0.0, 1.0])}


@pytest.mark.parametrize(
    "weights", [{}, {"gradient": 3.0, "curvature": 0.5}, PER_TERM], ids=["ones", "floats", "per term"]
)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_loss_and_gradients_are_those_of_ffr_loss(
    norm: str, kind: str, reduction: str, weights: dict[str, Any]
) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, 7, dtype=torch.float64)
    options = {"norm": norm, "curvature_kind": kind, "reduction": reduction, **weights}
    penalty, grads = tapped(model, x, **options)
    truth, true_grads = by_hand(model, x, **options)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


def shrinking(index: int, x: Tensor) -> Tensor:
    """Two more channels and half the size after features 2 and 3: stages of 3, 1 and 2 features."""
    if index in (2, 3):
        x = nn.functional.avg_pool2d(x, 2)
    return x


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32)], ids=["square", "rectangle"])
def test_terms_across_stage_boundaries(norm: str, kind: str, sizes: tuple[int, int]) -> None:
    model, x = Chain(6, change=shrinking), torch.randn(2, 3, *sizes, dtype=torch.float64)
    options = {"norm": norm, "curvature_kind": kind, "transition": "pool", "reduction": "sum"}
    penalty, grads = tapped(model, x, **options)
    truth, true_grads = by_hand(model, x, **options)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


class Widening(nn.Module):
    """Linear layers with more and more features: pooling pads channels, and only that."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [4, 4, 4, 6, 6, 9]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([3, *sizes]))
        self.double()

    forward, features = Chain.forward, Chain.features


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_terms_across_boundaries_that_only_add_channels(norm: str) -> None:
    model, x = Widening(), torch.randn(5, 3, dtype=torch.float64)
    penalty, grads = tapped(model, x, norm=norm, transition="pool")
    truth, true_grads = by_hand(model, x, norm=norm, transition="pool")
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


def test_unpool_is_the_adjoint_of_pooling() -> None:
    x = torch.randn(2, 3, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    pooled = reference.pool_to(x, torch.Size((2, 5, 2, 2, 2)))
    upstream = torch.randn_like(pooled)
    (truth,) = torch.autograd.grad(pooled, x, upstream)
    torch.testing.assert_close(taps.unpool(upstream, x.shape), truth)


LAYOUTS = {
    "channels_last": lambda _index, x: x.contiguous(memory_format=torch.channels_last),
    "mixed": lambda index, x: x.contiguous(memory_format=torch.channels_last) if index % 2 else x,
    "transposed": lambda _index, x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda _index, x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda _index, x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_layouts(norm: str, change: Callable[[int, Tensor], Tensor]) -> None:
    model, x = Chain(change=change), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    penalty, grads = tapped(model, x, norm=norm)
    truth, true_grads = by_hand(model, x, norm=norm)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


DTYPES = {
    "bf16": lambda _index, x: x.bfloat16(),
    "fp16": lambda _index, x: x.half(),
    "fp32": lambda _index, x: x.float(),
    "bf16 and fp32": lambda index, x: x.bfloat16() if index % 2 else x.float(),
    "fp16 and bf16": lambda index, x: x.bfloat16() if index == 2 else x.half(),
    "fp32 and fp64": lambda index, x: x.double() if index > 2 else x.float(),
}


@pytest.mark.parametrize("change", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_dtypes(norm: str, change: Callable[[int, Tensor], Tensor]) -> None:
    """Each feature's own gradient, before autograd adds anything to it, is the very same number."""
    model, x = Chain(change=change), torch.randn(4, 3, 9, dtype=torch.float64)
    with flow_of(model, norm=norm) as flow:
        kept: list[Tensor] = []
        for layer in model.layers:
            layer.register_forward_hook(lambda _module, _args, output: kept.append(output))
        model(x)
        penalty = flow.loss()
    leaves = [feature.detach().requires_grad_() for feature in kept]
    truth = ffr_loss(leaves, norm=norm, backend="cpu")
    truth.backward()
    (last,) = torch.autograd.grad(penalty, kept[-1])
    assert penalty.dtype == truth.dtype
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    torch.testing.assert_close(last, leaves[-1].grad, rtol=0, atol=0)


# --- when things happen ---------------------------------------------------------------------------


def test_each_gradient_is_made_right_before_its_layers_own_backward() -> None:
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_args: order.append(name)

    model, x = Chain(4), torch.randn(2, 3, 5, dtype=torch.float64)
    with flow_of(model) as flow:
        for index, layer in enumerate(model.layers):
            layer.register_forward_hook(
                lambda _module, _args, output, index=index: (
                    output.grad_fn.register_hook(note(f"layer {index}")) and None
                )
            )
        task = model(x).sum()
        for index, (_slot, token) in enumerate(flow._recorder.path.taps):
            token.grad_fn.register_hook(note(f"tap {index}"))
        (task + flow.loss()).backward()
    assert order == [f"{kind} {index}" for index in (3, 2, 1, 0) for kind in ("tap", "layer")]


def peak_of_backward(features: int, run: Callable[[Tensor, list[nn.Module]], Tensor]) -> int:
    """Peak bytes that forward and backward allocate, from the profiler's memory events."""
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()) for _ in range(features)]
    x = torch.randn(4, 8, 64, 64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run(x, blocks).backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler saw no memory events"
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_l1_costs_at_most_a_quarter_of_the_features_in_peak_memory() -> None:
    """12 fp32 features: signs are 11/12 x 1/8 of the features' bytes, one gradient is 1/12: 0.198 in all."""

    def without(x: Tensor, blocks: list[nn.Module]) -> Tensor:
        return nn.Sequential(*blocks)(x).square().sum()

    def just_in_time(x: Tensor, blocks: list[nn.Module]) -> Tensor:
        model = nn.Sequential(*blocks)
        with FeatureFlow(model, list(model), backend="cpu") as flow:
            return model(x).square().sum() + flow.loss()

    def one_node(x: Tensor, blocks: list[nn.Module]) -> Tensor:
        features = []
        for block in blocks:
            x = block(x)
            features.append(x)
        return x.square().sum() + ffr_loss(features, backend="cpu")

    count, size = 12, 4 * 4 * 8 * 64 * 64
    for run in (without, just_in_time, one_node):  # the second time: no first-call allocations
        peak_of_backward(count, run)
    base, tapped_peak, node_peak = (peak_of_backward(count, run) for run in (without, just_in_time, one_node))
    assert tapped_peak - base <= 0.25 * count * size
    assert node_peak - base > 0.9 * count * size, "one node for all gradients costs what taps save"


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_nothing_of_the_loss_is_alive_after_the_last_tap(norm: str) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    alive: list[weakref.ref[Tensor]] = []
    with flow_of(model, norm=norm) as flow:
        for layer in model.layers:
            layer.register_forward_hook(lambda _m, _a, output: alive.append(weakref.ref(output)))
        task = model(x).sum()
        (slot, _token) = flow._recorder.path.taps[0]
        penalty = flow.loss()
        (walk, _place) = slot.places[0]
        (task + penalty).backward()
    assert walk.live is None
    del task
    assert [reference() for reference in alive] == [None] * 5


def test_values_are_let_go_while_the_backward_pass_goes_down() -> None:
    """For norms that need values: the gradient of layer l needs no feature beyond l + 2."""
    model, x = Chain(6), torch.randn(4, 3, 5, dtype=torch.float64)
    held: list[list[bool]] = []
    kept: list[Tensor] = []
    with flow_of(model, norm="l2") as flow:
        for layer in model.layers:
            layer.register_forward_hook(lambda _m, _a, output: kept.append(output))
        model(x)
        (slot, _token) = flow._recorder.path.taps[0]
        penalty = flow.loss()
        (walk, _place) = slot.places[0]
        for feature in kept:  # right after a layer's own backward
            feature.grad_fn.register_hook(
                lambda *_args: held.append([v is not None for v in walk.live.values] if walk.live else [])
            )
        penalty.backward()
    assert held[0] == [True] * 6  # layer 5, whose gradient needs 3, 4, 5; taps 4 and 3 need 5 too
    assert held[2] == [True] * 5 + [False]  # layer 3
    assert held[4] == [True] * 3 + [False] * 3  # layer 1; tap 0 needs 0, 1, 2
    assert held[5] == []


# --- every kind of backward pass ------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_backward_twice_doubles_the_gradients(norm: str) -> None:
    model, x = ResidualNet(), images()
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        loss = task_loss(model(x)) + flow.loss()
    once = gradients(model, Retained(loss))
    loss.backward()
    assert_gradients_close([p.grad for p in model.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Retained:
    """A loss whose backward keeps the graph."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss

    def backward(self) -> None:
        self.loss.backward(retain_graph=True)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("order", ["task first", "penalty first", "together, then each"])
def test_the_two_losses_can_be_differentiated_apart(norm: str, order: str) -> None:
    model, x = ResidualNet(), images()
    logits, features = model.features(x)
    true_task = gradients(model, Retained(task_loss(logits)))
    true_penalty = gradients(model, ffr_loss(features, norm=norm, backend="cpu"))
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        task, penalty = task_loss(model(x)), flow.loss()
    if order.startswith("together"):
        (task + penalty).backward(retain_graph=True)
    losses = [(penalty, true_penalty), (task, true_task)]
    for loss, truth in losses if order == "penalty first" else reversed(losses):
        assert_gradients_close(gradients(model, Retained(loss)), truth)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_of_some_parameters_by_autograd_grad(norm: str) -> None:
    """Only the nodes on the way to them run; what is left over must not reach a later pass."""
    model, x = ResidualNet(), images()
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        loss = task_loss(model(x)) + 2 * flow.loss()
    logits, features = model.features(x)
    truth = task_loss(logits) + 2 * ffr_loss(features, norm=norm, backend="cpu")
    for parameters in (
        [model.late[1].conv.weight],
        [model.stem.weight, model.head.bias],
        [*model.parameters()],
    ):
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert_gradients_close([*got], [*torch.autograd.grad(truth, parameters, retain_graph=True)])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_of_a_captured_feature_alone_and_with_parameters(norm: str) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    kept: list[Tensor] = []
    model.layers[2].register_forward_hook(lambda _m, _a, output: kept.append(output))
    with flow_of(model, norm=norm) as flow:
        loss = model(x).sum() + flow.loss()
    features = model.features(x)
    truth = features[-1].sum() + ffr_loss(features, norm=norm, backend="cpu")
    weight = model.layers[0].weight
    expected_grads = torch.autograd.grad(truth, [features[2], weight])
    alone = torch.autograd.grad(loss, [kept[0]], retain_graph=True)
    both = torch.autograd.grad(loss, [kept[0], weight])
    torch.testing.assert_close(alone[0], expected_grads[0])
    torch.testing.assert_close(both, expected_grads)


def test_a_tensor_hook_on_a_feature_sees_the_whole_gradient() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    seen: list[Tensor] = []
    model.layers[2].register_forward_hook(lambda _m, _a, output: output.register_hook(seen.append) and None)
    with flow_of(model) as flow:  # its hook comes after the one that looks
        (model(x).sum() + flow.loss()).backward()
    tapped_seen = seen.pop()
    features = model.features(x)
    (features[-1].sum() + ffr_loss(features, backend="cpu")).backward()
    torch.testing.assert_close(tapped_seen, seen[-1])


def test_a_loss_that_is_never_differentiated_costs_the_next_step_nothing() -> None:
    model, x = ResidualNet(), images()
    _, truth = expected(model, x, backend="cpu")
    with FeatureFlow(model, backend="cpu") as flow:
        model(x)
        flow.loss()
        assert_gradients_close(gradients(model, task_loss(model(x)) + flow.loss()), truth)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_double_backward_raises(norm: str) -> None:
    model, x = ResidualNet(), images()
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        loss = task_loss(model(x)) + flow.loss()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*second derivative"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    for norm, dtypes in (("l1", [torch.uint8]), ("l2", [torch.float64] * 5)):
        model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
        _, truth = by_hand(model, x, norm=norm)
        packed: list[Tensor] = []
        with flow_of(model, norm=norm) as flow:
            task = model(x).sum()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, packed=packed: packed.append(tensor) or len(packed) - 1,
                lambda index, packed=packed: packed[index].clone(),
            ):
                penalty = flow.loss()
            # The features or the signs; the loss's own arithmetic saves only numbers per term.
            large = [t.dtype for t in packed if t.dtype == torch.uint8 or t.numel() == 4 * 3 * 5]
            assert large == dtypes
            assert_gradients_close(gradients(model, task + penalty), truth, 1e-13)


@pytest.mark.parametrize(("norm", "raises"), [("l1", False), ("l2", True)])
def test_a_feature_overwritten_between_loss_and_backward(norm: str, raises: bool) -> None:
    """The signs of l1 are a copy; the other norms need the values: autograd finds the change."""
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    kept: list[Tensor] = []
    model.layers[-1].change = lambda y: y * 1  # an output that no layer needs for its own backward
    model.layers[-1].register_forward_hook(lambda _m, _a, output: kept.append(output))
    _, truth = by_hand(model, x, norm=norm)
    kept.clear()
    with flow_of(model, norm=norm) as flow:
        task = model(x).sum()
        penalty = flow.loss()
    kept[0].mul_(3)
    if raises:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (task + penalty).backward()
    else:
        assert_gradients_close(gradients(model, task + penalty), truth, 1e-13)


# --- gradients added in place ---------------------------------------------------------------------


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each gradient that a kernel wrote: whether it was added to what was there."""
    seen: list[bool] = []
    write = taps._Live.write

    def spy(self: Any, place: int, grad: Tensor, accumulate: bool) -> None:
        seen.append(accumulate)
        write(self, place, grad, accumulate)

    monkeypatch.setattr(taps._Live, "write", spy)
    return seen


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        pytest.param(Chain, (2, 3, 5), id="chain"),
        pytest.param(ResidualNet, (2, 3, 8, 8), id="residual"),
        pytest.param(attention, (2, 5, 8), id="transformer"),
    ],
)
def test_gradients_are_added_in_place_where_autograd_would(
    build: Callable[[], Any], shape: tuple[int, ...], writes: list[bool]
) -> None:
    """All but the last feature's: with the penalty alone nothing else would arrive there."""
    model = build()
    x = torch.randn(*shape).to(next(model.parameters()).dtype)
    with FeatureFlow(model, getattr(model, "layers", "auto"), backend="cpu") as flow:
        (model(x).square().sum() + flow.loss()).backward()
    assert len(writes) > 3
    assert writes == [False] + [taps.MIN_BYTES == 0] * (len(writes) - 1)


def test_this_torch_tells_held_gradients_from_free_ones() -> None:
    """Where it does not, gradients are right all the same, and no longer added in place."""
    assert pending.counts_when_owned(torch.device("cpu")) is not None


@pytest.mark.parametrize(
    "keeper", ["module hook", "node hook", "view in a node hook", "tensor hook", "later tensor hook"]
)
def test_a_gradient_that_somebody_keeps_is_not_changed(keeper: str) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(grad: Tensor) -> None:
        grad = grad.view(-1) if keeper.startswith("view") else grad
        kept.append((grad, grad.clone()))

    def look(output: Tensor) -> None:
        if "node" in keeper:
            product = output.grad_fn.next_functions[0][0].next_functions[0][
                0
            ]  # tanh(feature * weight + bias)
            assert product.name().startswith("Mul")
            product.register_hook(lambda grads, _outputs: keep(grads[0]))
        elif keeper == "tensor hook":
            output.register_hook(keep)

    if keeper == "module hook":
        model.layers[3].register_full_backward_hook(lambda _m, grads, _outputs: keep(grads[0]))
    model.layers[3].register_forward_hook(lambda _m, _a, output: look(output))
    with flow_of(model) as flow:
        if keeper == "later tensor hook":
            model.layers[3].register_forward_hook(lambda _m, _a, output: output.register_hook(keep) and None)
        task = model(x).sum()
        grads = gradients(model, task + flow.loss())
    ((now, then),) = kept
    assert type(now) is Tensor
    torch.testing.assert_close(now, then, rtol=0, atol=0)
    _, true_grads = by_hand(model, x)
    assert_gradients_close(grads, true_grads, 1e-13)


class Branches(nn.Module):
    """Features side by side: with the penalty alone no gradient arrives from above."""

    class Double(torch.autograd.Function):
        """A kernel of the user's own, which reads its gradient by address."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert type(grad) is Tensor
            assert grad.data_ptr() != 0
            return grad * 2

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(6, dtype=torch.float64)) for _ in range(4))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))

    def features(self, x: Tensor) -> list[Tensor]:
        return [layer(self.Double.apply(x * w)) for layer, w in zip(self.layers, self.weights, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.features(x)).sum(0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_only_gradient_of_a_feature_is_an_ordinary_tensor(norm: str) -> None:
    model, x = Branches(), torch.randn(4, 6, dtype=torch.float64)
    truth = gradients(model, ffr_loss(model.features(x), norm=norm, backend="cpu"))
    with flow_of(model, norm=norm) as flow:
        model(x)
        assert_gradients_close(gradients(model, flow.loss()), truth, 1e-13)
    assert all(type(p.grad) in (Tensor, nn.Parameter) for p in model.parameters())


def test_a_pending_gradient_that_gets_out_behaves_like_a_tensor() -> None:
    """autograd.grad for a feature that no other gradient reaches returns it before any hook."""
    model, x = Branches(), torch.randn(4, 6, dtype=torch.float64)
    outputs: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda _m, _a, output: outputs.append(output))
    features = model.features(x)
    truth = torch.autograd.grad(ffr_loss(features, backend="cpu"), features[1])[0]
    outputs.clear()
    with flow_of(model) as flow:
        model(x)
        grad, _ = torch.autograd.grad(flow.loss(), [outputs[0], model.weights[1]])
    assert torch.equal(grad, truth)
    assert grad.tolist() == truth.tolist()
    assert (grad.numpy() == truth.numpy()).all()
    assert repr(grad)
    assert torch.equal(grad * 2, truth * 2)
    torch.testing.assert_close(grad + grad, truth + truth)


def test_anomaly_mode() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    _, truth = by_hand(model, x)
    with flow_of(model) as flow, torch.autograd.detect_anomaly(check_nan=True):
        assert_gradients_close(gradients(model, model(x).sum() + flow.loss()), truth, 1e-13)


# --- odd networks ---------------------------------------------------------------------------------


def test_only_features_that_require_grad_get_a_tap() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    for layer in model.layers[:3]:
        layer.requires_grad_(False)
    for norm in ("l1", "l2"):
        _, truth = by_hand(model, x, norm=norm)
        with flow_of(model, norm=norm) as flow:
            task = model(x).sum()
            assert [tap is not None for tap in flow._recorder.path.taps] == [False] * 3 + [True] * 2
            assert_gradients_close(gradients(model, task + flow.loss()), truth, 1e-13)


class Repeats(nn.Module):
    """The same tensor as two features, a leaf as a feature, and two features of one node."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(5))

    def features(self, x: Tensor) -> list[Tensor]:
        y = torch.tanh(x @ self.weight)
        left, right = torch.cat([y, y * 2], 1).chunk(2, 1)
        given = [self.leaf, y, y, left, right]
        return [layer(feature) for layer, feature in zip(self.layers, given, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_tensor_captured_twice_a_leaf_and_two_outputs_of_one_node(norm: str) -> None:
    model, x = Repeats(), torch.randn(4, 6, dtype=torch.float64)
    penalty, grads = tapped(model, x, norm=norm)
    truth, true_grads = by_hand(model, x, norm=norm)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


def test_two_flows_on_one_model_do_not_meet() -> None:
    model, x = ResidualNet(), images()
    logits, features = model.features(x)
    truth = gradients(
        model,
        task_loss(logits)
        + ffr_loss(features, backend="cpu")
        + 3 * ffr_loss(features[::2], norm="l2", transition="pool", backend="cpu"),
    )
    every = FeatureFlow(model, backend="cpu")
    second = ["early.0", "early.2", "late.1"]
    with every, FeatureFlow(model, second, norm="l2", transition="pool", backend="cpu") as some:
        loss = task_loss(model(x)) + every.loss() + 3 * some.loss()
        assert_gradients_close(gradients(model, loss), truth)


def test_features_and_losses_of_two_steps_can_be_alive_at_once() -> None:
    """Two forwards, two losses, and only then the backward passes, in the wrong order."""
    model = ResidualNet().eval()
    inputs = [images(2), images(4)]
    truths = [expected(model, x, norm="l2", backend="cpu")[1] for x in inputs]
    with FeatureFlow(model, norm="l2", backend="cpu", capture_eval=True) as flow:
        losses = [task_loss(model(x)) + flow.loss() for x in inputs]
        for loss, truth in zip(losses, truths, strict=True):
            assert_gradients_close(gradients(model, loss), truth)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_each_call_in_a_pass_by_hand_has_taps_of_its_own(norm: str) -> None:
    model, inputs = Chain(), [torch.randn(batch, 3, 5, dtype=torch.float64) for batch in (4, 2)]
    truths = [by_hand(model, x, norm=norm) for x in inputs]
    with flow_of(model, norm=norm) as flow:
        flow.begin_pass()
        task = sum(model(x).sum() for x in inputs)
        flow.end_pass()
        penalty = flow.loss()
    assert "FlowStats" not in graph_nodes(penalty)
    torch.testing.assert_close(penalty.detach(), truths[0][0] + truths[1][0], rtol=0, atol=0)
    true_grads = [a + b for a, b in zip(truths[0][1], truths[1][1], strict=True)]
    assert_gradients_close(gradients(model, task + penalty), true_grads, 1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 3, 1), (2, 3, 0)], ids=str)
def test_empty_and_tiny_features(shape: Sequence[int]) -> None:
    for norm in ("l1", "l2"):
        model, x = Chain(), torch.randn(*shape, dtype=torch.float64)
        penalty, grads = tapped(model, x, norm=norm)
        truth, true_grads = by_hand(model, x, norm=norm)
        torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
        assert_gradients_close(grads, true_grads, 1e-13)


# --- where there can be no taps -------------------------------------------------------------------


def test_the_reference_backend_and_torch_func_use_one_node() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    with FeatureFlow(model, model.layers, backend="reference") as flow:
        model(x)
        assert "Collect" not in graph_nodes(flow.loss())

    parameters = dict(model.named_parameters())
    with flow_of(model) as flow:

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).sum() + flow.loss()

        grads = torch.func.grad(loss)(parameters)
    _, truth = by_hand(model, x)
    assert_gradients_close([*grads.values()], truth, 1e-13)


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_and_autocast(dtype: torch.dtype) -> None:
    """A step under GradScaler changes the parameters as the plain node does, and an inf skips it."""
    results = []
    for use_taps in (True, False):
        torch.manual_seed(0)
        model, x = ResidualNet(), images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        flow = FeatureFlow(model, backend="cpu")
        flow._recorder.tapping = use_taps
        with flow:
            for overflow in (False, True):
                with torch.autocast("cpu", dtype=dtype):
                    loss = task_loss(model(x)) + flow.loss()
                optimizer.zero_grad()
                scaler.scale(loss * (float("inf") if overflow else 1)).backward()
                before = model.stem.weight.detach().clone()
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(before, model.stem.weight) == overflow
        assert scaler.get_scale() == 512.0
        results.append([p.detach().clone() for p in model.parameters()])
    assert_gradients_close(results[0], results[1], 0.02)


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("side_stream", [False, True], ids=["one stream", "every layer on another stream"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_on_a_gpu(norm: str, side_stream: bool) -> None:
    model, x = Chain(8).cuda(), torch.randn(64, 3, 64, 64, dtype=torch.float64, device="cuda")
    _, truth = by_hand_on(model, x, norm)
    if side_stream:
        for layer in model.layers:
            layer.change = on_another_stream
    for _ in range(3):
        with FeatureFlow(model, model.layers, norm=norm) as flow:
            grads = gradients(model, model(x).sum() + flow.loss())
        torch.cuda.synchronize()
        assert_gradients_close(grads, truth, 1e-12)


def by_hand_on(model: Chain, x: Tensor, norm: str) -> tuple[Tensor, list[Tensor | None]]:
    features = model.features(x)
    penalty = ffr_loss(features, norm=norm)
    return penalty.detach(), gradients(model, features[-1].sum() + penalty)


def on_another_stream(x: Tensor) -> Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 1
    torch.cuda.current_stream().wait_stream(stream)
    y.record_stream(torch.cuda.current_stream())
    return y


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    peaks = []
    for use_flow in (False, True):
        model = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()) for _ in range(12))).cuda()
        flow = FeatureFlow(model, list(model)) if use_flow else None
        for _ in range(2):  # the second step: the first one's workspaces are there
            if flow is not None:
                flow.attach()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = model(torch.randn(4, 8, 256, 256, device="cuda")).square().sum()
            (loss if flow is None else loss + flow.loss()).backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert peaks[1] - peaks[0] <= 0.25 * 12 * 4 * 4 * 8 * 256 * 256
