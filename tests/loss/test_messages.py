"""Each documented constraint raises the documented error: it names the argument, what was expected, and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ffr_ext import FeatureFlow, ffr_loss, flow_terms

X = torch.zeros(2, 3)
PAIR = [X, X]

CASES: list[Any] = [
    pytest.param(([],), {}, ValueError, "at least two features, got 0", id="no features"),
    pytest.param(([X],), {}, ValueError, "at least two features, got 1", id="one feature"),
    pytest.param(
        ([X, torch.zeros(2, 4), X],),
        {},
        ValueError,
        r"no two neighbours.*\(2, 4\).*transition='pool'",
        id="no stage",
    ),
    pytest.param((X,), {}, TypeError, r"got one Tensor of shape \(2, 3\).*unbind", id="a tensor"),
    pytest.param(({"a": X, "b": X},), {}, TypeError, r"\.values\(\)", id="a dict"),
    pytest.param((3,), {}, TypeError, "iterable of tensors.*got int", id="no iterable"),
    pytest.param(([X, None],), {}, TypeError, r"features\[1\].*NoneType", id="no tensor"),
    pytest.param(([X, X.long()],), {}, TypeError, r"features\[1\].*torch.int64", id="integers"),
    pytest.param(([X.cfloat(), X],), {}, TypeError, r"features\[0\].*complex64", id="complex"),
    pytest.param(([X.sum(), X.sum()],), {}, ValueError, r"features\[0\].*0-dim", id="rank 0"),
    pytest.param(([X.to_sparse(), X],), {}, TypeError, r"features\[0\].*sparse", id="sparse"),
    pytest.param(
        ([X, X.to("meta")],),
        {},
        ValueError,
        r"features\[0\] is on cpu and features\[1\] on meta",
        id="devices",
    ),
    pytest.param(
        ([X.to("meta"), X],),
        {},
        ValueError,
        r"features\[0\] is on meta and features\[1\] on cpu",
        id="devices, meta first",
    ),
    pytest.param((PAIR,), {"norm": "L1"}, ValueError, "norm: expected one of 'l1'.*got 'L1'", id="norm"),
    pytest.param((PAIR,), {"curvature_kind": "x"}, ValueError, "curvature_kind.*'angle'.*got 'x'", id="kind"),
    pytest.param((PAIR,), {"reduction": "none"}, ValueError, "reduction.*'mean'.*got 'none'", id="reduction"),
    pytest.param(
        (PAIR,), {"transition": "skip"}, ValueError, "transition.*'pool'.*got 'skip'", id="transition"
    ),
    pytest.param(
        (PAIR,), {"backend": "opencl"}, ValueError, "backend.*'reference'.*got 'opencl'", id="backend"
    ),
    pytest.param(
        (PAIR,), {"backend": "cuda"}, ValueError, "backend='cuda'.*cpu", id="backend of another device"
    ),
]
WEIGHTS: list[Any] = [
    pytest.param(
        {"gradient": [1.0, 2.0]},
        ValueError,
        r"gradient: expected one weight per term \(1\), got 2",
        id="list",
    ),
    pytest.param({"gradient": torch.ones(3)}, ValueError, r"gradient.*\(1\).*shape \(3,\)", id="tensor"),
    pytest.param({"curvature": torch.ones(1, 1)}, ValueError, r"curvature.*shape \(1, 1\)", id="matrix"),
    pytest.param({"gradient": "strong"}, TypeError, "gradient.*'strong'", id="string"),
    pytest.param({"gradient": True}, TypeError, "gradient.*True", id="bool"),
    pytest.param({"gradient": None}, TypeError, "gradient.*None", id="none"),
    pytest.param({"gradient": [True]}, TypeError, r"gradient\[0\].*True", id="bool in a list"),
    pytest.param({"gradient": ["1"]}, TypeError, r"gradient\[0\].*'1'", id="string in a list"),
    pytest.param({"gradient": [[1.0]]}, TypeError, r"gradient\[0\].*\[1.0\]", id="list in a list"),
    pytest.param({"gradient": b"a"}, TypeError, "gradient.*sequence.*b'a'", id="bytes"),
    pytest.param({"gradient": bytearray(b"a")}, TypeError, "gradient.*sequence.*bytearray", id="bytearray"),
    pytest.param({"gradient": [b"1"]}, TypeError, r"gradient\[0\].*b'1'", id="bytes in a list"),
    pytest.param({"gradient": {1.0}}, TypeError, "gradient.*sequence.*{1.0}", id="set"),
    pytest.param({"gradient": {0: 1.0}}, TypeError, "gradient.*sequence.*{0: 1.0}", id="dict"),
    pytest.param(
        {"gradient": [torch.ones((), requires_grad=True)]},
        TypeError,
        r"gradient\[0\].*would lose its gradient.*torch.stack",
        id="learnt weight in a list",
    ),
    pytest.param({"gradient": torch.tensor(True)}, TypeError, "gradient.*torch.bool", id="bool tensor"),
    pytest.param({"gradient": torch.ones(1) * 1j}, TypeError, "gradient.*complex64", id="complex tensor"),
    pytest.param({"gradient": float("nan")}, ValueError, "gradient.*finite.*nan", id="nan"),
    pytest.param({"gradient": np.float32("inf")}, ValueError, "gradient.*finite.*inf", id="numpy's inf"),
    pytest.param(
        {"curvature": [], "gradient": [float("inf")]}, ValueError, r"gradient\[0\].*finite.*inf", id="inf"
    ),
]


@pytest.mark.parametrize(("args", "options", "error", "match"), CASES)
@pytest.mark.parametrize("function", [ffr_loss, flow_terms])
def test_message(function: Any, args: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        function(*args, **options)


@pytest.mark.parametrize(("options", "error", "match"), WEIGHTS)
def test_message_of_weights(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ffr_loss(PAIR, **options)


@pytest.mark.parametrize("name", ["gradient", "curvature"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_weight_without_values_is_named(name: str, shape: tuple[int, ...], backend: str) -> None:
    features = [X, X + 1, X] if name == "curvature" else PAIR
    with pytest.raises(
        ValueError, match=f"{name}: expected a tensor with values, got one on the device meta"
    ):
        ffr_loss(features, **{name: torch.ones(shape, device="meta")}, backend=backend)


def test_features_without_values_take_any_weights() -> None:
    features = [X.to("meta"), X.to("meta")]
    for weight in (torch.ones(()), torch.ones(1, device="meta")):
        assert ffr_loss(features, gradient=weight, backend="reference").is_meta


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        (torch.nn.ReLU, r"layers: .*got the class ReLU; .*lambda name, module: isinstance\(module, ReLU\)"),
        (lambda name: True, r"layers: expected a predicate \(name, module\) -> bool, got one with \(name\)"),
    ],
    ids=["class", "predicate of a name"],
)
def test_message_of_layers(layers: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        FeatureFlow(torch.nn.Sequential(torch.nn.ReLU()), layers)


@pytest.mark.parametrize(
    ("earlier", "later", "reason"),
    [
        pytest.param((2, 4, 6, 6), (2, 3, 3, 3), "channels go down from 4 to 3", id="fewer channels"),
        pytest.param((2, 4, 6, 6), (2, 8, 4, 4), "size 6 of dim 2 is not a whole multiple of 4", id="ratio"),
        pytest.param((2, 4, 3, 3), (2, 4, 6, 6), "size 3 of dim 2 is not a whole multiple of 6", id="larger"),
        pytest.param((2, 4, 6, 6), (2, 4), r"ranks differ \(4 and 2\)", id="rank"),
        pytest.param((2, 4), (3, 4), "batch sizes differ", id="batch"),
    ],
)
def test_unmappable_boundary_names_both_features(
    earlier: tuple[int, ...], later: tuple[int, ...], reason: str, backend: str
) -> None:
    features = [torch.zeros(earlier)] * 2 + [torch.zeros(later)] * 2
    with pytest.raises(ValueError, match=reason) as error:
        ffr_loss(features, transition="pool", backend=backend)
    for part in ("features[1]", "features[2]", str(earlier), str(later)):
        assert part in str(error.value)


def test_a_weight_on_terms_that_do_not_exist_warns() -> None:
    with pytest.warns(UserWarning, match="no stage has the three features"):
        assert ffr_loss(PAIR, gradient=0.0).item() == 0.0
