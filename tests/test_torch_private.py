"""Each question to torch's private parts answers, and has an answer where torch does not know it."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffr_ext
from ffr_ext import _torch

PACKAGE = Path(ffr_ext.__file__).parent
PRIVATE = re.compile(
    r"torch\._[A-Za-z]|_pytree|\._(forward|backward)\w*hooks|(?<!self)\._(parameters|buffers)\b|\._is_replica"
    r"|_make_wrapper_subclass|\._schema\b|\._overloadname|[a-z]\._version\b|\._use_count|\._cdata|_dynamo_marked"
    r"|\._(BatchNorm|NormBase|ConvNd|ConvTransposeNd)\b|super\(torch\.|\._metadata"
)


def test_no_other_file_uses_a_private_name_of_torch() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_torch.py"
        for line in path.read_text().splitlines()
        if PRIVATE.search(line)
    }
    assert not found, "\n".join(sorted(found))


def test_trees() -> None:
    tree = {"a": [torch.ones(1), 2], "b": (torch.zeros(1), OrderedDict(c=3))}
    assert [type(leaf) for leaf in _torch.tree_leaves(tree)] == [Tensor, int, Tensor, int]
    assert _torch.tree_map(lambda leaf: 0, tree) == {"a": [0, 0], "b": (0, OrderedDict(c=0))}
    doubled = _torch.map_tensors(lambda t: t + 1, tree)
    assert (doubled["a"][0], doubled["a"][1], doubled["b"][0]) == (2, 2, 1)


class _Asks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, seen: list[int]) -> Tensor:
        ctx.seen = seen  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(_torch.graph_task())  # type: ignore[attr-defined]
        return grad, None


def test_graph_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        _Asks.apply(x, seen).sum().backward()
    assert _torch.graph_task() == -1
    assert -1 not in seen
    assert seen[0] != seen[1]
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    _Asks.apply(x, seen).sum().backward()
    assert seen[2] == -1


def test_transforms_active(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(x: Tensor) -> Tensor:
        answers.append(_torch.transforms_active())
        return x.sum()

    answers: list[bool] = []
    torch.func.grad(ask)(torch.ones(2))
    assert answers == [True]
    assert not _torch.transforms_active()
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    torch.func.grad(ask)(torch.ones(2))
    assert answers == [True, False]


def test_constant_when_compiled() -> None:
    @_torch.constant_when_compiled
    def untraceable(name: str) -> int:
        return len(open(__file__).read(1)) + len(name)

    compiled = torch.compile(lambda x: x + untraceable("abc"), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 4


def test_version() -> None:
    x = torch.zeros(2)
    before = _torch.version(x)
    x.add_(1)
    assert before is not None
    assert _torch.version(x) == before + 1
    with torch.inference_mode():
        assert _torch.version(torch.zeros(2)) is None


def test_traced_version() -> None:
    written = torch.compile(lambda x: x.add_(_torch.traced_version(x)), fullgraph=True, backend="eager")
    assert written(torch.ones(())) == 1
    assert _torch.traced_version(torch.zeros(2)) == 0


def test_unscales_by_itself() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    assert not _torch.unscales_by_itself(optimizer)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # what fused optimizers set
    assert _torch.unscales_by_itself(optimizer)


def test_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2)

    def keep(module: nn.Module, args: object) -> None: ...
    def watch(module: nn.Module, args: object, kwargs: object, output: object) -> None: ...
    def watch_backward(module: nn.Module, grads: object) -> None: ...

    module.register_forward_pre_hook(keep)
    module.register_forward_hook(watch, with_kwargs=True, always_call=True)
    module.register_full_backward_pre_hook(watch_backward)
    assert _torch.hooks(module) == [watch, keep, watch_backward]
    _torch.keep_hooks(module, lambda hook: hook is keep)
    assert _torch.hooks(module) == [keep]
    assert module(torch.zeros(1, 2)).shape == (1, 2)
    monkeypatch.setattr(_torch, "_HOOKS", ("_no_such_table",))
    assert _torch.hooks(module) == []


def test_operators() -> None:
    add = torch.ops.aten.add.Tensor
    assert [a.name for a in _torch.schema(add).arguments] == ["self", "other", "alpha"]
    assert _torch.schema(len) is None
    assert _torch.overload_name(add) == "Tensor"
    assert _torch.overload_name(torch.ops.aten.relu.default) == "default"


def test_size_of() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[x > 0], x.flatten()])

    graph = torch.export.export(Chosen(), (torch.randn(2, 3),), strict=False).graph
    values = [n.meta.get("val") for n in graph.nodes]
    sizes = [_torch.size_of(v.shape[0], 101) for v in values if isinstance(v, Tensor)]
    assert sizes[0] == 2
    assert sizes[-1] == 101 + 6
    assert _torch.size_of(object(), 101) == 101


def test_assume_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skipping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            (rows,) = torch.where(x[:, 0] > 0)
            if rows.numel() == 0:
                return x
            return x.index_add(0, rows, x[rows])

    class Assuming(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            with _torch.AssumeRows():
                return super().forward(x)

    x = torch.randn(4, 2)
    ops = [str(n.target) for n in torch.export.export(Assuming(), (x,), strict=False).graph.nodes]
    assert any("index_add" in op for op in ops)
    assert torch.equal(Assuming()(x), Skipping()(x)), "outside of a trace it changes nothing"
    monkeypatch.delattr(torch, "_check")
    assert torch.equal(Assuming()(x), Skipping()(x))


def test_assume_rows_of_a_loop() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({f"layer_{i}": nn.Linear(2, 2) for i in range(3)})

        def forward(self, x: Tensor) -> Tensor:
            chosen = x.sum(-1).relu().long().clamp(max=2)
            hit = F.one_hot(chosen, 3).sum(0).greater(0).nonzero()
            for place in hit:
                mask = (chosen == place).unsqueeze(-1)
                x = x + mask * self.layers[f"layer_{place[0]}"](x)
            return x

    class Assuming(Looping):
        def forward(self, x: Tensor) -> Tensor:
            with _torch.AssumeRows():
                return super().forward(x)

    torch.manual_seed(0)
    model, x = Assuming(), torch.randn(4, 2)
    with torch.no_grad():  # as in `trace`: with gradients, a traced number is none
        program = torch.export.export(model, (x,), strict=False)
    linear = [n for n in program.graph.nodes if str(n.target).startswith("aten.linear")]
    assert len(linear) == 3, "all places, whichever are hit"
    looping = Looping()
    looping.load_state_dict(model.state_dict())
    torch.testing.assert_close(program.module()(x), looping(x))
    torch.testing.assert_close(model(x), looping(x))


def test_masks_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    detect = nn.modules.transformer._detect_is_causal_mask
    causal = torch.triu(torch.full((3, 3), float("-inf")), 1)
    with _torch.masks_as_given():
        assert nn.modules.transformer._detect_is_causal_mask(causal, None, 3) is False
        assert nn.modules.transformer._detect_is_causal_mask(causal, True, 3) is True
    assert nn.modules.transformer._detect_is_causal_mask is detect
    monkeypatch.delattr(nn.modules.transformer, "_detect_is_causal_mask")
    with _torch.masks_as_given():
        assert not hasattr(nn.modules.transformer, "_detect_is_causal_mask")
