"""FeatureFlow: outputs that are no plain tensor, and what it leaves behind on the model and in memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from flow_models import Calls, Checkpointed, ResidualNet, expected, hooks, images, make_flow, task_loss
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss

# --- what a layer may return ----------------------------------------------------------------------


@dataclass
class Fields:
    hidden: Tensor
    other: Tensor


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    ("wrap", "unwrap", "output"),
    [
        pytest.param(lambda y: (y, y * 2), lambda o: o[0], None, id="tuple"),
        pytest.param(lambda y: (None, torch.ones(3), y), lambda o: o[2], 2, id="tuple, by index"),
        pytest.param(
            lambda y: (torch.ones(3, dtype=torch.long), y), lambda o: o[1], None, id="integers are skipped"
        ),
        pytest.param(lambda y: OrderedDict(a=y, b=y * 2), lambda o: o["a"], None, id="dict"),
        pytest.param(lambda y: {"a": y * 2, "b": y}, lambda o: o["b"], "b", id="dict, by key"),
        pytest.param(lambda y: Fields(y, y * 2), lambda o: o.hidden, "hidden", id="object, by attribute"),
        pytest.param(lambda y: Fields(y, y * 2), lambda o: o.hidden, lambda o: o.hidden, id="function"),
        pytest.param(lambda y: ([y, y * 2], 3), lambda o: o[0][0], None, id="nested"),
    ],
)
def test_outputs_that_are_no_tensor(wrap: Any, unwrap: Any, output: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return unwrap(self.b(unwrap(self.a(x))))

    model = Calls(forward, a=Returns(wrap), b=Returns(wrap))
    x = torch.randn(3, 4)
    first = model.a.linear(x)
    with make_flow(model, ["a", "b"], output=output) as flow:
        model(x)
        torch.testing.assert_close(flow.loss(), ffr_loss([first, model.b.linear(first)], backend="reference"))


class Key(str, Enum):
    HIDDEN = "hidden"


class Index(IntEnum):
    LAST = 1


@pytest.mark.parametrize(
    ("output", "plain"),
    [
        (np.int64(1), 1),
        (np.uint8(1), 1),
        (Index.LAST, 1),
        (Key.HIDDEN, "hidden"),
        (np.str_("hidden"), "hidden"),
    ],
)
def test_an_output_may_be_of_numpy_or_an_enum(output: Any, plain: Any) -> None:
    """It means the plain index or key, in messages too."""
    wrap = (lambda y: (None, y)) if plain == 1 else (lambda y: {"hidden": y})
    model = Calls(lambda self, x: self.b(self.a(x)[plain])[plain], a=Returns(wrap), b=Returns(wrap))
    x = torch.randn(3, 4)
    first = model.a.linear(x)
    with make_flow(model, ["a", "b"], output=output) as flow:
        assert type(flow.output) is type(plain)
        assert flow.output == plain
        model(x)
        torch.testing.assert_close(flow.loss(), ffr_loss([first, model.b.linear(first)], backend="reference"))


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [(None, TypeError, "layer 'a'.*Fields"), (0, ValueError, "output=0"), ("x", ValueError, "output='x'")],
)
def test_an_output_without_the_feature_names_the_layer(output: Any, error: Any, message: str) -> None:
    wrap = lambda y: Fields(y, y)  # noqa: E731
    model = Calls(lambda self, x: self.b(self.a(x).hidden).hidden, a=Returns(wrap), b=Returns(wrap))
    with make_flow(model, ["a", "b"], output=output), pytest.raises(error, match=message):
        model(torch.randn(3, 4))


# --- what is left behind --------------------------------------------------------------------------


def test_no_state_dict_key_while_attached_and_no_hook_after() -> None:
    model = ResidualNet()
    keys = list(model.state_dict())
    with make_flow(model):
        assert list(model.state_dict()) == keys
        assert hooks(model) == 2 + 6
    assert hooks(model) == 0
    with pytest.raises(RuntimeError), make_flow(model):
        model(torch.randn(2, 5, 8, 8))  # five channels
    assert hooks(model) == 0


def test_attach_and_detach_twice_is_harmless_and_dropping_the_flow_removes_its_hooks() -> None:
    model = ResidualNet()
    flow = make_flow(model).attach().attach()
    assert hooks(model) == 2 + 6
    flow.detach()
    flow.detach()
    assert hooks(model) == 0
    flow.attach()
    del flow
    gc.collect()
    assert hooks(model) == 0


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save", "ema"])
def test_the_model_can_be_copied_and_saved_while_attached(copier: str) -> None:
    model, x = ResidualNet(), images()
    truth = expected(model, x, backend="reference")[0]
    with make_flow(model) as flow:
        model(x)
        if copier == "deepcopy":
            twin = copy.deepcopy(model)
        elif copier == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        elif copier == "ema":
            twin = torch.optim.swa_utils.AveragedModel(model)
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            assert (
                buffer.tell() < 2 * 4 * sum(p.numel() for p in model.parameters()) + 65536
            )  # no features inside
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        twin(images(5))  # the copy feeds nobody
        torch.testing.assert_close(flow.loss().detach(), truth)


def test_a_flow_that_is_copied_with_its_model_is_detached_and_works_on_the_copy() -> None:
    model = ResidualNet()
    model.__dict__["flow"] = make_flow(model).attach()
    twin = copy.deepcopy(model)
    assert twin.flow.model is twin
    assert not twin.flow.attached
    assert model.flow.attached
    with twin.flow:
        twin(images())
        twin.flow.loss().backward()
    assert model.stem.weight.grad is None
    assert twin.stem.weight.grad is not None


def test_features_are_released_step_by_step() -> None:
    model = ResidualNet()
    alive: list[weakref.ref[Tensor]] = []
    model.early[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    with make_flow(model) as flow:
        for _ in range(4):
            (task_loss(model(images())) + flow.loss()).backward()
        assert sum(reference() is not None for reference in alive) == 0


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("model_class", [ResidualNet, Checkpointed])
def test_many_steps_leave_no_tensor_behind(model_class: type[nn.Module], backend: str) -> None:
    model = model_class()
    with FeatureFlow(model, backend=backend) as flow:
        counts = []
        for step in range(30):
            model.zero_grad()
            (task_loss(model(images())) + flow.loss()).backward()
            if step in (4, 29):
                counts.append(live_tensors())
    assert counts[0] == counts[1]
