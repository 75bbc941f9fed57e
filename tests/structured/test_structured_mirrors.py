"""Mirrors are the transposes of their layers: shapes, and <W a, b> = <a, W^T b>."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structured_nets import convolutional
from torch import Tensor, nn

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from ffr_ext.structured import StructuredOutput

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def task_of(layer: nn.Module) -> tuple[nn.Sequential, StructuredOutput]:
    """The input task of one layer without biases, and the model with it."""
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(1)).double()
    return model, StructuredOutput(
        model, first=[layer], input=1.0, output=0.0, corruption=0.0, reconstruction="identity"
    )


def check_adjoint(layer: nn.Module, x: Tensor) -> None:
    _, tasks = task_of(layer)
    out = layer(x)
    b = torch.randn_like(out)
    back = tasks.mirrors["input"](b, "b", [tuple(x.shape)])
    assert back.shape == x.shape
    torch.testing.assert_close((out * b).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)
    assert tasks.reconstruct_input(x).shape == x.shape


@pytest.mark.parametrize(("stride", "size", "dims"), list(product([1, 2, 3], [7, 8, 9], [1, 2])))
def test_the_mirror_of_a_convolution_is_its_adjoint_at_every_stride_and_size(
    stride: int, size: int, dims: int
) -> None:
    layer = CONV[dims](2, 3, 3, stride=stride, padding=1, bias=False).double()
    check_adjoint(layer, torch.randn(2, 2, *[size] * dims, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mirrors_of_random_convolutions_are_their_adjoints(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    kernel = data.draw(st.tuples(*[st.integers(1, 4)] * dims))
    dilation = data.draw(st.tuples(*[st.integers(1, 2)] * dims))
    groups = data.draw(st.sampled_from([1, 2]))
    padding = data.draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * dims)))
    stride = (1,) * dims if padding == "same" else data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    options: dict[str, Any] = {"padding": padding, "stride": stride}
    size = data.draw(st.tuples(*[st.integers(7, 10)] * dims))
    layer = CONV[dims](2, 4, kernel, dilation=dilation, groups=groups, bias=False, **options).double()
    check_adjoint(layer, torch.randn(1, 2, *size, dtype=torch.float64))


@pytest.mark.parametrize(("stride", "extra", "dims"), [(1, 0, 1), (2, 0, 2), (2, 1, 2), (3, 2, 1), (2, 1, 3)])
def test_the_mirror_of_a_transposed_convolution_is_its_adjoint(stride: int, extra: int, dims: int) -> None:
    layer = TRANSPOSED[dims](3, 2, 3, stride=stride, padding=1, output_padding=extra, bias=False).double()
    check_adjoint(layer, torch.randn(2, 3, *[5] * dims, dtype=torch.float64))


def test_linear_layers_are_mirrored_over_the_last_dimension() -> None:
    check_adjoint(nn.Linear(6, 4, bias=False).double(), torch.randn(3, 5, 6, dtype=torch.float64))


def test_a_convolutional_input_task_is_its_formula() -> None:
    model = convolutional().eval()
    conv1, conv2 = model[0], model[3]
    tasks = StructuredOutput(model, first=model[:6], input=1.0, output=0.0)
    d1, d2 = tasks.mirrors["input"].biases
    with torch.no_grad():
        d1.normal_()
        d2.normal_()
    x = torch.rand(2, 2, 9, 9, dtype=torch.float64)
    code = torch.tanh(conv2(F.relu(conv1(x))))
    back = F.relu(F.conv_transpose2d(code, conv2.weight, d2))
    back = torch.sigmoid(F.conv_transpose2d(back, conv1.weight, d1, stride=2, padding=1))
    torch.testing.assert_close(tasks.loss(x=x), F.mse_loss(back, x))


def test_a_convolutional_output_task_is_its_formula() -> None:
    model = convolutional()
    up1, up2 = model[9], model[11]
    tasks = StructuredOutput(model, last=model[7:])
    d1, d2 = tasks.mirrors["output"].biases
    with torch.no_grad():
        d1.normal_()
        d2.normal_()
    y = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    hidden = torch.tanh(F.conv2d(y, up2.weight, d2, stride=2, padding=1))
    # The mirrored Unflatten flattens, and the sigmoid in front of last ends the code.
    code = torch.sigmoid(F.conv2d(hidden, up1.weight, d1, stride=2, padding=1).flatten(1))
    torch.testing.assert_close(tasks.encode_output(y), code)
    torch.testing.assert_close(tasks.loss(y=y), F.mse_loss(model[8:](code), y))


@pytest.mark.parametrize(
    ("kernel", "padding", "size"), [(3, 1, 8), (2, 0, 8), (5, 2, 8), (4, 1, 8), (3, 0, 9)]
)
def test_without_the_size_in_front_of_a_strided_convolution_the_mirror_of_last_takes_the_stride_times_it(
    kernel: int, padding: int, size: int
) -> None:
    """Where no such size gives the output, the smallest that does."""
    last = nn.Conv1d(2, 3, kernel, stride=2, padding=padding)
    model = nn.Sequential(nn.Conv1d(1, 2, 1), last)
    y = last(torch.randn(1, 2, size))
    tasks = StructuredOutput(model, last=[last])
    assert tasks.encode_output(y).shape == (1, 2, size)
    tasks.loss(y=y).backward()


@pytest.mark.parametrize("dim", [1, -1])
def test_unflatten_is_undone_from_either_end(dim: int) -> None:
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 12), nn.Unflatten(dim, (3, 4)), nn.Conv1d(3, 2, 1))
    y = torch.randn(6, 2, 4)
    assert StructuredOutput(model, last=model[1:]).encode_output(y).shape == (6, 12)


def test_dropout_is_skipped_in_mirrors() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.9), nn.Linear(5, 7), nn.Dropout(0.9))
    tasks = StructuredOutput(model, last=model[1:])
    y = torch.randn(4, 7)
    torch.testing.assert_close(tasks.encode_output(y), y @ model[2].weight)
