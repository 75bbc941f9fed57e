"""What `compact` promises besides equal outputs: the source stays, everything else about the model stays,
the report says why."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from pruning_models import Block, Residual, X, dead, difference, fingerprint
from torch import Tensor, nn

from ffr_ext import FeatureFlow, compact
from ffr_ext.pruning import prune_to


def test_counts_are_the_analytic_ones() -> None:
    model = dead()
    result = compact(model, torch.randn(X))
    gone = 2 * 5 * (8 * 9 + 8 * 9 + 2)  # per filter: its weights, its columns in conv2, gamma and beta
    assert result.report.parameters == (before := sum(p.numel() for p in model.parameters()), before - gone)
    per_pixel = 2 * 2 * 64  # multiply and add, two samples, 8 x 8 pixels
    assert result.report.flops[0] - result.report.flops[1] == 2 * 5 * 2 * 8 * 9 * per_pixel
    # and running mean and variance
    assert result.report.bytes[0] - result.report.bytes[1] == 4 * (gone + 2 * 5 * 2)
    assert result.report.latency is not None
    assert min(result.report.latency) > 0


def test_the_source_is_untouched_and_the_result_is_plain() -> None:
    model = dead().train()
    model.blocks[0].bn1.eval()
    model.stem[0].weight.requires_grad_(False)
    model.blocks[0].conv1.weight.requires_grad_(False)
    before, modes = fingerprint(model), [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    with FeatureFlow(model, layers=["blocks.0", "blocks.1"]):
        result = compact(model, torch.randn(X), measure=False).model
        assert any(m._forward_hooks for m in model.modules())
    assert fingerprint(model) == before
    assert [m.training for m in model.modules()] == modes == [m.training for m in result.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.modules())
    assert {type(m) for m in result.modules()} <= {type(m) for m in model.modules()}
    assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in model.parameters()]
    assert list(result.state_dict()) == list(model.state_dict())
    del state


def test_the_random_state_is_untouched() -> None:
    model, x = dead(), torch.randn(X)
    state = torch.random.get_rng_state()
    compact(model, x, measure=False)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Constants behind padding are carried, and 0.3 is no number of bfloat16."""

    class Filled(Residual):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = super().forward(x + torch.full_like(x, 0.3))
            return result

    torch.manual_seed(0)
    model, x = Filled().eval(), torch.randn(X)
    with torch.no_grad():
        for block in model.blocks:
            block.bn1.weight[:5] = 0
            block.bn1.bias[:5] = 0.3
    torch.set_default_dtype(dtype)
    try:
        result = compact(model, x, measure=False)
        smaller = prune_to(model, x, flops=0.7, measure=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [block.conv1.out_channels for block in result.model.blocks] == [8, 8]
    assert smaller.report.flops[1] <= 0.7 * smaller.report.flops[0]
    assert result.model.blocks[0].conv1.weight.dtype == torch.float32
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_a_default_device_moves_nothing(strict: bool) -> None:
    model, x = dead().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.blocks[0].bn1.bias[:3] = 0.5  # dead filters with a constant that is to be taken up
        model.blocks[0].bn1.weight[:3] = 0
    expected = compact(model, x, strict=strict, measure=False)
    with torch.device("meta"):
        got = compact(model, x, strict=strict, measure=False)
        applied = got.plan.apply(copy.deepcopy(model))
    assert got.plan.digest() == expected.plan.digest()
    assert torch.equal(got.model(x), expected.model(x))
    assert torch.equal(applied(x), expected.model(x))


def test_whole_numbers_of_numpys_are_counts() -> None:
    plain = compact(dead(), torch.randn(X), round_to=4, measure=False).plan
    assert compact(dead(), torch.randn(X), round_to=np.int64(4), measure=False).plan.cuts == plain.cuts


class Summed(nn.Module):
    """Two convolutions with a group norm whose outputs are added; dead channels in both."""

    def __init__(self, computed: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.norm_a, self.norm_b = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            for conv, norm in ((self.a, self.norm_a), (self.b, self.norm_b)):
                for tensor in (conv.weight, conv.bias, norm.weight, norm.bias):
                    tensor[:4] = 0
        if computed:
            # Filters of zeros have no direction; their length is what weight_norm sets to 0.
            nn.init.normal_(getattr(self, computed).weight)
            layer = nn.utils.parametrizations.weight_norm(getattr(self, computed))
            nn.init.zeros_(layer.parametrizations.weight.original0[:4])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.a(x)).relu()
        return self.head((x + self.norm_b(self.b(x))).mean((2, 3)))


@pytest.mark.parametrize("computed", ["", "a", "b", "head"])
def test_channels_of_a_computed_weight_stay_and_the_report_says_why(computed: str) -> None:
    model = Summed(computed).eval()
    report = compact(model, torch.randn(X), measure=False).report
    (channels,) = [s for s in report.sets if any("norm_a.weight" in t for t in s.tensors)] or [report.sets[0]]
    if not computed:
        assert channels.removed == 4
        return
    assert channels.removed == 0
    op = "linear" if computed == "head" else "conv2d"
    (reason,) = channels.reasons
    assert reason.startswith(f"the weight of {op} in {computed} is no parameter but computed")
    assert report.notes == []


def test_inplace_cuts_the_model_itself() -> None:
    model = dead()
    source = copy.deepcopy(model)
    result = compact(model, torch.randn(X), inplace=True)
    assert result.model is model
    assert model.blocks[0].conv1.out_channels == 7
    assert difference(source, model) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = dead().to(dtype)
    result = compact(model, torch.randn(X, dtype=dtype), measure=False)
    assert result.model.blocks[1].conv1.out_channels == 7
    assert all(p.dtype == dtype for p in result.model.parameters())
    assert difference(model, result.model, torch.randn(X, dtype=dtype)) <= 0.05


def test_memory_format_stays() -> None:
    model = dead().to(memory_format=torch.channels_last)
    result = compact(model, torch.randn(X).to(memory_format=torch.channels_last), measure=False).model
    for module in result.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).relu() + self.b(x).relu())

    model = Tied()
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.a.bias[:3] = -1
        model.b.bias[:3] = -1
    result = compact(model, torch.randn(2, 6), measure=False).model
    assert result.b.weight is result.a.weight
    assert result.a.weight.shape == (5, 6)
    assert (result.a.out_features, result.b.out_features) == (5, 5)
    assert difference(model, result, torch.randn(4, 6)) < 1e-6


def test_gradients_come_along() -> None:
    model = dead()
    model(torch.randn(X)).sum().backward()
    result = compact(model, torch.randn(X), measure=False).model
    assert torch.equal(result.blocks[0].conv1.weight.grad, model.blocks[0].conv1.weight.grad[5:])
    assert torch.equal(result.head.weight.grad, model.head.weight.grad)


def test_running_twice_removes_nothing_more() -> None:
    model = dead()
    with torch.no_grad():
        model.blocks[0].conv1.weight.zero_()
    first = compact(model, torch.randn(X), measure=False)
    second = compact(first.model, torch.randn(X), measure=False)
    assert second.plan.is_empty
    assert "as large and as fast as before" in str(second.report)


@pytest.mark.parametrize(("round_to", "kept"), [(1, 7), (4, 8), (8, 8), (5, 10), (16, 12)])
def test_round_to(round_to: int, kept: int) -> None:
    """7 live of 12: the next multiple, or all where there is none."""
    model = dead()
    with torch.no_grad():
        model.blocks[0].bn1.weight[:5] = 0
        model.blocks[0].conv1.weight[3] = 1.0  # the strongest of the dead: alive, but behind a gamma of 0
    result = compact(model, torch.randn(X), round_to=round_to, measure=False)
    assert result.model.blocks[0].conv1.out_channels == kept
    assert difference(model, result.model) < 1e-6
    if kept == 8:
        indices = next(c for c in result.plan.cuts["blocks.0.conv1.weight"] if c.dim == 0).keep
        assert indices == [3, 5, 6, 7, 8, 9, 10, 11]
        assert "round_to" in result.report.explain()


def test_a_size_is_filled_once_where_a_channel_is_at_two_places() -> None:
    """Gate and up projections in one weight: 27 live units are 54 rows, and one more unit makes 56 of them."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 64), nn.Linear(32, 3)
            with torch.no_grad():
                self.up.weight[:5] = self.up.bias[:5] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(torch.nn.functional.silu(gate) * up)

    torch.manual_seed(0)
    small = compact(Gated().eval(), torch.randn(2, 4), round_to=8, measure=False).model
    assert (small.up.out_features, small.down.in_features) == (56, 28)


@pytest.mark.parametrize("min_channels", [1, 3])
def test_a_layer_that_is_all_dead_keeps_min_channels(min_channels: int) -> None:
    model = dead(filters=12)
    with torch.no_grad():
        for block in model.blocks:
            block.bn2.bias.normal_()  # the branch adds a constant: it cannot go as a whole
    result = compact(model, torch.randn(X), min_channels=min_channels, measure=False)
    assert [b.conv1.out_channels for b in result.model.blocks] == [min_channels] * 2
    assert difference(model, result.model) < 1e-6


def test_a_dead_branch_leaves_as_a_whole() -> None:
    """relu(x + 0) of an x behind a relu is x: the block is an identity."""
    model = dead()
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
    result = compact(model, torch.randn(X), measure=False)
    assert isinstance(result.model.blocks[1], nn.Identity)
    assert result.report.replaced == {"blocks.1": "Identity"}
    assert "blocks.1: dead as a whole" in result.report.explain()
    assert difference(model, result.model) == 0
    torch.export.export(result.model, (torch.randn(X),))


def test_a_dead_module_whose_sum_is_no_identity_gives_zeros() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.branch(x)).relu()

    model = Outer()
    with torch.no_grad():
        model.branch[2].weight.zero_()
        model.branch[2].bias.zero_()
    result = compact(model, torch.randn(X), measure=False)
    assert isinstance(result.model.branch, nn.Threshold)
    assert not list(result.model.parameters())
    assert difference(model, result.model) == 0


def test_an_identity_that_the_forward_code_looks_into_stays() -> None:
    """The parent reads an attribute of the block: `nn.Identity` has none."""

    class Nosy(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x) * (1.0 if block.conv1.kernel_size == (3, 3) else 2.0)
            return self.head(x.mean((2, 3)))

    model = dead(Nosy())
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
    result = compact(model, torch.randn(X), measure=False)
    assert isinstance(result.model.blocks[1], Block)
    assert result.model.blocks[1].conv1.out_channels == 1
    assert any("cannot be replaced" in note for note in result.report.notes)


class Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(1)


def test_unknown_ops_keep_their_channels_and_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 8, 1) for _ in range(3))
            self.mix = Mix()
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.c(x).chunk(2, 1)
            joined = torch.cat([left, right], 1)
            return self.last(self.mix(self.a(x)) + joined + Branches.apply(self.b(x)))

    class Mix(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bchw,cd->bdhw", x.cummax(1).values, torch.eye(8))

    model = Odd().eval()
    with torch.no_grad():
        for layer in (model.a, model.b, model.c):
            layer.weight[:3] = 0
            layer.bias[:3] = 0
    result = compact(model, torch.randn(X), measure=False)
    assert result.model.a.out_channels == result.model.b.out_channels == 8
    assert any(what == "cummax in mix" for what in result.report.unknown_ops), result.report.unknown_ops
    assert "cummax in mix" in result.report.explain()
    assert difference(model, result.model) < 1e-6


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_example_inputs(kind: str) -> None:
    x = torch.randn(X)
    inputs = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[kind]
    assert compact(dead(), inputs, measure=False).model.blocks[0].conv1.out_channels == 7


def test_a_masked_model_says_what_to_do_or_is_compacted() -> None:
    """torch.nn.utils.prune computes weight = weight_orig * mask in a hook; the mask is a buffer like any
    other."""
    from torch.nn.utils import prune

    model = dead()
    mask = torch.ones_like(model.blocks[0].conv1.weight)
    mask[:7] = 0
    prune.custom_from_mask(model.blocks[0].conv1, "weight", mask)
    with torch.no_grad():
        model.blocks[0].bn1.weight[:7] = 0
        model.blocks[0].bn1.bias[:7] = 0
    prune.remove(model.blocks[0].conv1, "weight")
    result = compact(model, torch.randn(X), measure=False)
    assert result.model.blocks[0].conv1.out_channels == 5
    assert difference(model, result.model) < 1e-6
