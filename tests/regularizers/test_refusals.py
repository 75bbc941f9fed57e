"""What the regularizers refuse, and that nothing has changed then."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lenet_double import X, lenet
from pruning_models import Residual
from torch import Tensor, nn

from ffr_ext.pruning import prune_to, synthesize
from ffr_ext.regularizers import OutInChannelLasso, ScaleLasso, SparseGroupLasso, Stress

WRONG = [
    (lambda m: ScaleLasso(m, weight=-1.0), ValueError, "weight: expected a number of at least 0, got -1.0"),
    (lambda m: ScaleLasso(m, weight=math.inf), ValueError, "weight: expected a finite float"),
    (lambda m: ScaleLasso(m, weight="1"), TypeError, "weight: expected a float"),
    (
        lambda m: ScaleLasso(m, weight=1.0, form="proximal"),
        ValueError,
        "form: expected one of 'gradient', 'prox'",
    ),
    (lambda m: ScaleLasso(nn.Linear(2, 2), weight=1.0), ValueError, "ScaleLasso finds nothing to regularise"),
    (lambda m: ScaleLasso("m", weight=1.0), TypeError, "model: expected a torch.nn.Module, got str"),
    (lambda m: SparseGroupLasso("m", weight=1.0), TypeError, "model: expected a torch.nn.Module, got str"),
    (
        lambda m: SparseGroupLasso(nn.ReLU(), weight=1.0),
        ValueError,
        "SparseGroupLasso finds nothing to regularise",
    ),
    (lambda m: SparseGroupLasso(m, weight=1.0, sparse="l2"), ValueError, "sparse: expected one of 'l0'"),
    (lambda m: SparseGroupLasso(m, weight=1.0, groups="in"), ValueError, "groups: expected one of 'out'"),
    (
        lambda m: SparseGroupLasso(m, weight=1.0, groups="coupled"),
        ValueError,
        "example_inputs: groups='coupled' needs",
    ),
    (lambda m: SparseGroupLasso(m, weight=1.0, beta=0.0), ValueError, "beta: expected a number above 0"),
    (lambda m: SparseGroupLasso(m, weight=1.0, a=3.0), ValueError, "a: 'l0' has no such parameter"),
    (
        lambda m: SparseGroupLasso(m, weight=1.0, include_norm=1),
        TypeError,
        "include_norm: expected True or False",
    ),
    (lambda m: SparseGroupLasso(nn.LazyLinear(3), weight=1.0), ValueError, "run the model once"),
    (lambda m: OutInChannelLasso(m, X, weight=math.nan), ValueError, "weight: expected a finite float"),
    (lambda m: OutInChannelLasso(m, X, weight=1.0, scope="outer"), ValueError, "scope: expected one of"),
    (
        lambda m: OutInChannelLasso(m, X, weight=1.0, separated=None),
        TypeError,
        "separated: expected True or False",
    ),
    (
        lambda m: OutInChannelLasso(nn.Linear(8, 2).double(), X, weight=1.0),
        ValueError,
        "OutInChannelLasso finds nothing to regularise: no channel may leave it; 2 filters stay: an output",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments_are_named(
    make: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(lenet())


class ReadByFourier(nn.Module):
    """Its channels are read by an op that nothing is known about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.fft(self.conv1(x)).real
        return self.conv2(spectrum).mean((2, 3))


class Branches(ReadByFourier):
    """Its graph depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return self.conv2(y if y.sum() > 0 else -y).mean((2, 3))


NEEDS_GROUPS = {
    "out-in": lambda m, x: OutInChannelLasso(m, x, weight=1.0),
    "coupled": lambda m, x: SparseGroupLasso(m, weight=1.0, groups="coupled", example_inputs=x),
    "stress": lambda m, x: Stress(m, x),
    "budget": lambda m, x: prune_to(m, x, flops=0.5),
    "synthesis": lambda m, x: synthesize(m, x),
}


@pytest.mark.parametrize("kind", NEEDS_GROUPS)
@pytest.mark.parametrize(
    ("make", "said"), [(ReadByFourier, "fft_fft in the model's own forward"), (Branches, r"y\.sum\(\) > 0")]
)
def test_groups_that_cannot_be_traced_are_refused_with_the_op(make: Any, said: str, kind: str) -> None:
    model, x = make(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        NEEDS_GROUPS[kind](model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_cannot_be_added_to_is_refused_before_anything_changes() -> None:
    model = lenet()
    regularizer = OutInChannelLasso(model, X, weight=1.0)
    model[7].weight.grad = torch.zeros_like(model[7].weight).to_sparse()
    with pytest.raises(TypeError, match="expected a dense"):
        regularizer.add_gradients_()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["7.weight"]


def test_a_model_that_was_cut_since_is_refused_before_anything_changes() -> None:
    from ffr_ext import compact

    model = Residual().eval()
    regularizers = [
        ScaleLasso(model, weight=1.0),
        SparseGroupLasso(model, weight=1.0),
        OutInChannelLasso(model, X.float(), weight=1.0),
    ]
    with torch.no_grad():
        for parameter in model.blocks[0].bn1.parameters():
            parameter[:3] = 0
    compact(model, X.float(), inplace=True, measure=False)
    for regularizer in regularizers:
        with pytest.raises(ValueError, match="make them again"):
            regularizer.add_gradients_()
    assert all(p.grad is None for p in model.parameters())
