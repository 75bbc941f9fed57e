"""A StructuredOutput among other things: its state, copies, FeatureFlow, compaction, compile, autocast, import."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structured_nets import batch, both, mlp
from torch import nn

from ffr_ext import FeatureFlow, compact, zero_small_filters
from ffr_ext.structured import StructuredOutput


def test_it_owns_the_biases_of_the_mirrors_alone_and_an_optimizer_sees_each() -> None:
    model = mlp()
    tasks = both(model)
    shapes = {name: tuple(value.shape) for name, value in tasks.state_dict().items()}
    assert shapes == {
        "mirrors.input.biases.0": (6,),
        "mirrors.input.biases.1": (5,),
        "mirrors.output.biases.0": (3,),
    }
    assert model not in set(tasks.modules())
    x, y = batch()
    optimizer = torch.optim.SGD([*model.parameters(), *tasks.parameters()], lr=0.1)
    tasks.loss(x, y).backward()
    optimizer.step()
    assert all(bool((bias != 0).any()) for bias in tasks.parameters())


def test_a_saved_state_is_loaded_again() -> None:
    model, (x, y) = mlp(), batch()
    tasks, other = both(model), both(model)
    with torch.no_grad():
        for bias in tasks.parameters():
            bias.normal_()
    file = io.BytesIO()
    torch.save(tasks.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.loss(x, y), tasks.loss(x, y))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_tasks_shares_weights_as_they_do(duplicate: Any) -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model)
    tasks.loss(x, y)
    new_model, new_tasks = duplicate((model, tasks))
    with torch.no_grad():
        new_model[6].weight.mul_(2)
        expected = both(new_model).loss(x, y)
    assert torch.equal(new_tasks.loss(x, y), expected)
    assert not torch.equal(tasks.loss(x, y), expected)


def test_feature_flow_and_the_tasks_on_one_model_add_up() -> None:
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.rand(5, 6, dtype=torch.float64)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh()))).double()
    tasks = StructuredOutput(model, first=model[:2], last=model[5:], input=1.0, corruption=0.0)
    model.zero_grad()
    tasks.loss(x, y).backward()
    of_tasks = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    with FeatureFlow(model, [str(i) for i in (1, 3, 5, 7)]) as flow:
        model.zero_grad()
        model(x)
        flow.loss().backward()
        of_flow = [p.grad.clone() for p in model.parameters()]
        for order in ("tasks last", "tasks between"):
            model.zero_grad()
            model(x)
            between = tasks.loss(x, y) if order == "tasks between" else None
            penalty = flow.loss()
            (penalty + (between if between is not None else tasks.loss(x, y))).backward()
            for p, a, b in zip(model.parameters(), of_tasks, of_flow, strict=True):
                torch.testing.assert_close(p.grad, a + b, rtol=1e-12, atol=1e-14)


def test_a_compacted_net_is_exact_and_knows_nothing_of_the_tasks() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 12),
        nn.ReLU(),
        nn.Linear(12, 12),
        nn.ReLU(),
        nn.Linear(12, 8),
        nn.Tanh(),
        nn.Linear(8, 7),
        nn.Tanh(),
    ).double()
    tasks = StructuredOutput(model, first=model[:2], last=model[5:], input=1.0)
    optimizer = torch.optim.Adam([*model.parameters(), *tasks.parameters()], lr=1e-2)
    x, y = batch()
    for _ in range(20):
        optimizer.zero_grad()
        (F.mse_loss(model(x), y[:5]) + tasks.loss(x, y)).backward()
        optimizer.step()
    with torch.no_grad():
        for layer, dead in ((model[0], [1, 5]), (model[2], [0, 3, 4]), (model[4], [2])):
            layer.weight[dead], layer.bias[dead] = 0, 0
    zero_small_filters(model, 0.0)
    expected = model(x)
    done = compact(model, x)
    gone = weakref.ref(tasks), weakref.ref(tasks.mirrors["output"].biases[0])
    del tasks, optimizer
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None
    assert [done.model[i].out_features for i in (0, 2, 4, 6)] == [10, 9, 7, 7]
    torch.testing.assert_close(done.model(x), expected, rtol=1e-12, atol=1e-14)
    assert not [name for name, _ in done.model.named_parameters() if "mirror" in name]


def test_layers_that_changed_shape_are_noticed() -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model)
    model[6].weight, model[6].in_features = nn.Parameter(torch.rand(7, 2, dtype=torch.float64)), 2
    with pytest.raises(RuntimeError, match=r"6 \(Linear\) has another shape.*new StructuredOutput"):
        tasks.loss(x, y)


def test_it_compiles_into_one_graph() -> None:
    model, (x, y) = mlp(), batch()
    tasks = both(model, reconstruction="sigmoid")
    expected = tasks.loss(x, y)
    expected.backward()
    by_eager = [p.grad for m in (model, tasks) for p in m.parameters()]
    model.zero_grad()
    tasks.zero_grad()
    compiled = torch.compile(lambda a, b: tasks.loss(a, b), fullgraph=True, backend="aot_eager")
    loss = compiled(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for p, expected_grad in zip((p for m in (model, tasks) for p in m.parameters()), by_eager, strict=True):
        torch.testing.assert_close(p.grad, expected_grad)
    undecided = both(model)
    with pytest.raises(Exception, match="'auto' looks at the first x"):
        torch.compile(lambda a: undecided.loss(x=a), backend="aot_eager", fullgraph=True)(x)


def test_it_runs_under_autocast_with_a_loss_in_float32() -> None:
    model = mlp(torch.float32)
    x, y = (t.float() for t in batch())
    tasks = both(model)
    exact = tasks.loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tasks.loss(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=1e-3)


def test_a_model_of_half_precision_has_a_loss_in_float32() -> None:
    model, exact = mlp(torch.bfloat16), mlp(torch.float32)
    exact.load_state_dict(model.state_dict())
    x, y = (t.bfloat16() for t in batch())
    loss = both(model).loss(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, both(exact).loss(x.float(), y.float()), rtol=2e-2, atol=1e-3)


def test_inputs_and_labels_are_not_written_to() -> None:
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 7)
    )
    tasks = StructuredOutput(model, first=model[:2], last=model[3:], input=1.0, corruption=0.0)
    x, y = torch.randn(5, 6), torch.randn(5, 7)
    kept = x.clone(), y.clone()
    tasks.loss(x, y).backward()
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def test_importing_the_package_does_not_load_it_and_it_needs_torch_alone() -> None:
    code = "import sys, torch, ffr_ext; before = set(sys.modules); import ffr_ext.structured; "
    code += "assert 'ffr_ext.structured' not in before; "
    code += "ours = {n for n in set(sys.modules) - before if n.split('.')[0] != 'ffr_ext'}; "
    code += "assert {n.split('.')[0] for n in ours} <= {'torch', *sys.stdlib_module_names}, ours"
    subprocess.run([sys.executable, "-c", code], check=True)
