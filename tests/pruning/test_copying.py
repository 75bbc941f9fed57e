"""Copies of a model for the pruning side: what comes along and what stays."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from pruning_models import X, dead, difference
from torch import Tensor, nn

from ffr_ext import compact, sparsity, zero_small_filters
from ffr_ext.models import copy_without_hooks, deep_copy
from ffr_ext.pruning import channel_groups, prune_to


def test_features_that_a_forward_has_kept_come_along_without_their_graphs() -> None:
    """As many a forward keeps them; copy.deepcopy refuses such a model."""
    model = dead()
    model.features = {"stem": [model.stem(torch.randn(X))]}
    model.last = model.blocks[0](model.features["stem"][0])
    model.register_buffer("running", model.last.mean((0, 2, 3)))
    result = compact(model, torch.randn(X)).model
    assert difference(model, result) < 1e-6
    assert model.last.grad_fn is not None
    for kept, copied in (
        (model.last, result.last),
        (model.running, result.running),
        (model.features["stem"][0], result.features["stem"][0]),
    ):
        assert copied.grad_fn is None
        assert copied is not kept
        assert torch.equal(copied, kept)
    (point,) = zero_small_filters(model, 1e-3, example_inputs=torch.randn(X), dry_run=True)
    assert point.error is not None


def test_what_a_module_shares_is_shared_by_its_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.first = model.second = model(torch.randn(1, 2))
    copied = deep_copy(model)
    assert copied[1].weight is copied[0].weight is not model[0].weight
    assert copied.first is copied.second is not model.first


def test_hooks_that_watch_stay_with_the_source() -> None:
    seen = []

    class Watcher:
        def __call__(self, *_arguments: object, **_keywords: object) -> None:
            seen.append("object")

        def method(self, *_arguments: object) -> None:
            seen.append("method")

    def function(_module: nn.Module, _inputs: Tensor, _output: Tensor) -> None:
        seen.append("function")

    model = nn.Linear(2, 2)
    model.register_forward_hook(Watcher(), with_kwargs=True, always_call=True)
    model.register_forward_hook(Watcher().method)
    model.register_forward_hook(function)
    model.register_full_backward_hook(Watcher())
    copied = copy_without_hooks(model)
    copied(torch.randn(1, 2)).sum().backward()
    assert not seen
    assert not any(
        (copied._forward_hooks, copied._forward_hooks_with_kwargs, copied._forward_hooks_always_called)
    )
    model(torch.randn(1, 2)).sum().backward()
    assert seen == ["object", "method", "function", "object"]


def doubled(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


def compiled(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def doubled_inside(model: nn.Module) -> None:
    doubled(model.get_submodule("2"))


FUNCTIONS = {
    "compact": lambda model, x: compact(model, x, measure=False),
    "compact in place": lambda model, x: compact(model, x, measure=False, inplace=True),
    "prune_to": lambda model, x: prune_to(model, x, flops=0.9, measure=False),
    "channel_groups": channel_groups,
    "sparsity": lambda model, x: sparsity(model, example_inputs=x),
}


def conv_net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[0].weight.data[:3], model[0].bias.data[:3] = 0, 0
    return model.eval()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wrap", [doubled, compiled, doubled_inside])
def test_a_forward_that_a_copy_would_share_is_refused(
    wrap: Callable[[nn.Module], None], function: str
) -> None:
    """The copy would compute with the weights of the original, whatever becomes of its own."""
    model = conv_net()
    wrap(model)
    with pytest.raises(
        ValueError, match=r"^model: a copy of Sequential computes with \S+weight.* of the original"
    ):
        FUNCTIONS[function](model, torch.randn(2, 3, 9, 9))


def test_a_forward_that_is_bound_to_its_module_is_copied() -> None:
    """As accelerate and many patches do it."""
    model, x = conv_net(), torch.randn(2, 3, 9, 9)
    model.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), model)
    result = compact(model, x, measure=False).model
    assert result.get_parameter("0.weight").shape[0] == 5
    torch.testing.assert_close(result(x), model(x))
