"""What each op does to dead channels: one small net per op, what must leave, and outputs that stay to 1e-6.

In every net `a` is the layer with dead filters; `left` says how many filters of which layers must be left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffr_ext import compact


class Net(nn.Module):
    """Layers by name, and a function of them as forward."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    left: dict[str, int]
    reason: str


def kill(layer: nn.Module, filters: slice | list[int], bias: float = 0.0, dim: int = 0) -> nn.Module:
    """Zero filters of a layer and set their bias."""
    with torch.no_grad():
        layer.weight.movedim(dim, 0)[filters] = 0
        if layer.bias is not None:
            layer.bias[filters] = bias
    return layer


def conv(i: int, o: int, k: int = 3, dead: slice | list[int] = slice(0), bias: float = 0.0, **kw: Any) -> nn.Module:
    return kill(nn.Conv2d(i, o, k, **kw), dead, bias)


def linear(i: int, o: int, dead: slice | list[int] = slice(0), bias: float = 0.0) -> nn.Module:
    return kill(nn.Linear(i, o), dead, bias)


def norm(channels: int, dead: slice | list[int] = slice(0), beta: float = 0.0) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.weight[dead] = 0
        layer.bias[dead] = beta
    return layer


DEAD = slice(0, 3)
IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)

CASES = {
    "zero-behind-padding": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD), b=conv(8, 4, padding=1)),
        IMAGE, {"a": 5}, "0 is 0 at the border too"),
    "constant-without-padding": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD, bias=0.7), b=conv(8, 4, bias=False)),
        IMAGE, {"a": 5}, "the constant becomes the bias of b, which had none"),
    "constant-behind-padding": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD, bias=0.7), b=conv(8, 4, padding=1)),
        IMAGE, {"a": 8}, "a constant is no bias at a zero-padded border"),
    "negative-constant-behind-relu": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD, bias=-0.7), b=conv(8, 4, padding=1)),
        IMAGE, {"a": 5}, "the activation makes it 0"),
    "batch-norm-constant": Case(
        lambda: Net(lambda m, x: m.b(F.silu(m.n(m.a(x)))), a=conv(3, 8, dead=DEAD), n=norm(8), b=conv(8, 4)),
        IMAGE, {"a": 5}, "beta - gamma mean / std, absorbed"),
    "batch-norm-constant-behind-padding": Case(
        lambda: Net(lambda m, x: m.b(F.silu(m.n(m.a(x)))), a=conv(3, 8, dead=DEAD), n=norm(8), b=conv(8, 4, padding=1)),
        IMAGE, {"a": 8}, "a dead filter, but not a dead channel"),
    "gamma-zero": Case(
        lambda: Net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 8), n=norm(8, DEAD, -1.0), b=conv(8, 4, padding=1)),
        IMAGE, {"a": 5}, "the filter is alive, its channel is not"),
    "reflect-padding": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD, bias=0.7),
                    b=conv(8, 4, padding=1, padding_mode="reflect")),
        IMAGE, {"a": 5}, "a constant stays one under reflection"),
    "same-padding": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD, bias=0.7), b=conv(8, 4, padding="same")),
        IMAGE, {"a": 8}, "padded by name"),
    "f-pad-with-the-constant": Case(
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=0.7)), a=conv(3, 8, dead=DEAD, bias=0.7),
                    b=conv(8, 4)),
        IMAGE, {"a": 8}, "float32 0.7 is not the padding's 0.7"),
    "f-pad-with-zero": Case(
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1))), a=conv(3, 8, dead=DEAD), b=conv(8, 4)),
        IMAGE, {"a": 5}, "a border of 0 around 0"),
    "nobody-reads-it": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8), b=kill(conv(8, 4, padding=1), DEAD, dim=1)),
        IMAGE, {"a": 5}, "live filters whose readers have zero columns"),
    "only-dead-filters-read-it": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 4),
                    b=conv(4, 6, dead=[0, 1, 2, 3], padding=1), c=conv(6, 2)),
        IMAGE, {"b": 2, "a": 4}, "a has other readers, the dead rows of b go"),
    "dead-chain": Case(
        lambda: Net(lambda m, x: m.d(x) + m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6, padding=1),
                    b=conv(6, 6, padding=1), c=kill(conv(6, 4, padding=1), slice(0, 4)), d=conv(3, 4, padding=1)),
        IMAGE, {"a": 1, "b": 1}, "a branch without an outlet: one channel is what the forward code needs"),
    "conv1d": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).tanh()), a=kill(nn.Conv1d(3, 8, 3), DEAD, 0.4), b=nn.Conv1d(8, 4, 3)),
        (2, 3, 9), {"a": 5}, "one spatial dimension"),
    "conv3d": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=kill(nn.Conv3d(3, 8, 2), DEAD, 0.4), b=nn.Conv3d(8, 4, 2)),
        (2, 3, 4, 4, 4), {"a": 5}, "three"),
    "strided-dilated": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD, bias=0.4), b=conv(8, 4, stride=2, dilation=2)),
        IMAGE, {"a": 5}, "no border effects"),
    "transposed-dead": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=kill(nn.ConvTranspose2d(3, 8, 2, stride=2), DEAD, 0.0, dim=1),
                    b=conv(8, 4, padding=1)),
        IMAGE, {"b": 4}, "its filters are dimension 1"),
    "transposed-reader-of-zero": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD), b=nn.ConvTranspose2d(8, 4, 3, stride=2)),
        IMAGE, {"a": 5}, "0 spreads to 0"),
    "transposed-reader-of-constant": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD, bias=0.4),
                    b=nn.ConvTranspose2d(8, 4, 3, stride=2)),
        IMAGE, {"a": 8}, "outputs of a constant depend on the phase of the stride"),
    "depthwise": Case(
        lambda: Net(lambda m, x: m.c(m.n(m.b(m.a(x).relu())).relu()), a=conv(3, 8, dead=DEAD),
                    b=nn.Conv2d(8, 8, 3, padding=1, groups=8), n=norm(8, DEAD, -1), c=conv(8, 4)),
        IMAGE, {"a": 5, "b": 5}, "each channel has its own filter"),
    "depthwise-multiplier": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 8, dead=DEAD),
                    b=nn.Conv2d(8, 16, 3, groups=8), c=conv(16, 4)),
        IMAGE, {"a": 5, "b": 10}, "the two filters of a channel leave with it"),
    "depthwise-dead-itself": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu())), a=conv(3, 8), b=conv(8, 8, dead=DEAD, groups=8, bias=0.3),
                    c=conv(8, 4)),
        IMAGE, {"a": 5, "b": 5}, "then nobody reads its input"),
    "groups-evenly": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 8, dead=[0, 5]),
                    b=conv(8, 12, dead=[1, 11], groups=2, padding=1), c=conv(12, 4)),
        IMAGE, {"a": 6, "b": 10}, "different inputs of each group, as many of each"),
    "groups-unevenly": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 8, dead=[0, 1, 5]),
                    b=conv(8, 12, dead=[1, 2, 11], groups=2, padding=1), c=conv(12, 4)),
        IMAGE, {"a": 6, "b": 10}, "a dead channel stays so that groups are of one size"),
    "whole-group": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 9, dead=[3, 4, 5]),
                    b=conv(9, 12, dead=[4, 5, 6, 7], groups=3, padding=1), c=conv(12, 4)),
        IMAGE, {"a": 6, "b": 8}, "the group goes"),
    "groups-absorb": Case(
        lambda: Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=conv(3, 8, dead=[0, 5], bias=0.9),
                    b=conv(8, 6, dead=[0, 3], groups=2, bias=0.2), c=conv(6, 4, 1)),
        IMAGE, {"a": 6, "b": 4}, "constants go into the bias of their own group"),
    "residual-both-dead": Case(
        lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 8, dead=[0, 1, 2]), b=conv(3, 8, dead=[1, 2, 3]),
                    c=conv(8, 4, padding=1)),
        IMAGE, {"a": 6, "b": 6}, "the intersection"),
    "residual-in-place": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).add_(m.b(x)).relu_()), a=conv(3, 8, dead=[0, 1, 2]),
                    b=conv(3, 8, dead=[1, 2, 3]), c=conv(8, 4, padding=1)),
        IMAGE, {"a": 6, "b": 6}, "the same, written in place"),
    "in-place-seen-through-a-view": Case(
        lambda: Net(_writes_through_a_view, a=conv(3, 8, dead=DEAD), b=conv(8, 4)),
        IMAGE, {"a": 8}, "a channel that was 0 before it was written to"),
    "difference-and-product": Case(
        lambda: Net(lambda m, x: m.c((m.a(x) - 2 * m.b(x)) * m.d(x).sigmoid()), a=conv(3, 8, dead=DEAD),
                    b=conv(3, 8, dead=DEAD), c=conv(8, 4, padding=1), d=conv(3, 8)),
        IMAGE, {"a": 5, "d": 5}, "0 times anything"),
    "division": Case(
        lambda: Net(lambda m, x: m.c(m.a(x) / (1 + m.b(x).square())), a=conv(3, 8, dead=DEAD, bias=0.5),
                    b=conv(3, 8, dead=DEAD, bias=1.0), c=conv(8, 4)),
        IMAGE, {"a": 5, "b": 5}, "0.5 / 2"),
    "squeeze-excite": Case(
        lambda: Net(lambda m, x: _squeeze_excite(m, m.a(x).relu()), a=conv(3, 8, dead=DEAD), f=conv(8, 4, 1, dead=[0]),
                    g=conv(4, 8, 1), c=conv(8, 2, padding=1)),
        IMAGE, {"a": 5, "g": 5, "f": 3}, "the gate of a dead channel goes with it"),
    "concat": Case(
        lambda: Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x[:, :, 1:-1, 1:-1]], 1)), a=conv(3, 8, dead=DEAD),
                    b=conv(3, 6, dead=[5]), c=conv(17, 4, padding=1)),
        IMAGE, {"a": 5, "b": 5}, "channels keep their places, also beside the input"),
    "batch-norm-over-concat": Case(
        lambda: Net(lambda m, x: m.c(m.n(torch.cat([m.a(x), m.b(x)], 1)).relu()), a=conv(3, 8, dead=DEAD), b=conv(3, 6),
                    n=norm(14, DEAD, -1), c=conv(14, 4, padding=1)),
        IMAGE, {"a": 5, "b": 6}, "as in DenseNet"),
    "chunk": Case(
        lambda: Net(_gate_by_chunk, a=conv(3, 8, dead=[0, 4, 5]), c=conv(4, 2, padding=1)),
        IMAGE, {"a": 6}, "halves stay halves: channel 0 and its gate 4 go, 5 stays with 1"),
    "glu": Case(
        lambda: Net(lambda m, x: m.c(F.glu(m.a(x), 1)), a=conv(3, 8, dead=[0, 4]), c=conv(4, 2, padding=1)),
        IMAGE, {"a": 6}, "chunk by another name"),
    "chunk-with-one-half-unread": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).chunk(2, 1)[0]), a=conv(3, 8, dead=[0]), b=conv(4, 2)),
        IMAGE, {"a": 6}, "the second half is not read, but keeps as many channels as the first"),
    "halves-with-one-reader": Case(
        lambda: Net(lambda m, x: sum(m.b(p) for p in m.a(x).chunk(2, 1)), a=conv(3, 8, dead=[0, 1, 5]), b=conv(4, 2)),
        IMAGE, {"a": 6}, "b has one column for channels 1 and 5"),
    "slice": Case(
        lambda: Net(lambda m, x: m.c(m.a(x)[:, 2:]), a=conv(3, 8, dead=DEAD), c=conv(6, 2)),
        IMAGE, {"a": 8}, "the 2 is written in the forward code"),
    "max-pool": Case(
        lambda: Net(lambda m, x: m.c(F.max_pool2d(m.a(x), 3, 2, 1)), a=conv(3, 8, dead=DEAD, bias=-0.5), c=conv(8, 4, 1)),
        IMAGE, {"a": 5}, "its padding is -inf, so a constant stays"),
    "avg-pool-padded-zero": Case(
        lambda: Net(lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1)), a=conv(3, 8, dead=DEAD), c=conv(8, 4, 1)),
        IMAGE, {"a": 5}, "0 averaged with padding"),
    "avg-pool-padded-constant": Case(
        lambda: Net(lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1)), a=conv(3, 8, dead=DEAD, bias=0.5), c=conv(8, 4, 1)),
        IMAGE, {"a": 8}, "the padding counts: smaller at the border"),
    "avg-pool-not-counting": Case(
        lambda: Net(lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False)),
                    a=conv(3, 8, dead=DEAD, bias=0.5), c=conv(8, 4, 1)),
        IMAGE, {"a": 5}, "the padding does not count"),
    "interpolate": Case(
        lambda: Net(lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")),
                    a=conv(3, 8, dead=DEAD, bias=0.5), c=conv(8, 4)),
        IMAGE, {"a": 5}, "weights that sum to 1"),
    "flatten": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).relu().flatten(1)), a=conv(3, 8, dead=DEAD, bias=0.5), c=linear(8 * 36, 4)),
        IMAGE, {"a": 5}, "a channel is 36 columns of the linear layer"),
    "flatten-after-padding": Case(
        lambda: Net(lambda m, x: m.c(F.pad(m.a(x), (1, 0)).flatten(1)), a=conv(3, 8, dead=DEAD), c=linear(8 * 42, 4)),
        IMAGE, {"a": 5}, "a border of 0 in it"),
    "reshape-and-permute": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).flatten(2).transpose(1, 2)), a=conv(3, 8, dead=DEAD, bias=0.5),
                    c=linear(8, 4)),
        IMAGE, {"a": 5}, "channels become the features of tokens"),
    "channel-shuffle": Case(
        lambda: Net(_channel_shuffle, a=conv(3, 8, dead=DEAD), c=conv(8, 4)),
        IMAGE, {"a": 8}, "a view over two dimensions fixes their sizes"),
    "mean": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).mean((2, 3))), a=conv(3, 8, dead=DEAD, bias=0.5), c=linear(8, 4)),
        IMAGE, {"a": 5}, "the mean of a constant"),
    "mean-over-channels": Case(
        lambda: Net(lambda m, x: m.a(x).mean(1), a=conv(3, 8, dead=DEAD)),
        IMAGE, {"a": 8}, "the number of channels counts"),
    "softmax-over-channels": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).softmax(1)), a=conv(3, 8, dead=DEAD), c=conv(8, 4)),
        IMAGE, {"a": 8}, "exp(0) is in the sum"),
    "dropout": Case(
        lambda: Net(lambda m, x: m.c(F.dropout2d(m.a(x), 0.5, m.training)), a=conv(3, 8, dead=DEAD), c=conv(8, 4)),
        IMAGE, {"a": 5}, "nothing in eval mode"),
    "group-norm": Case(
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8, dead=slice(0, 4)), n=_group_norm(4, 8, slice(0, 3)),
                    c=conv(8, 4, padding=1)),
        IMAGE, {"a": 6, "n.num_groups": 3}, "only a whole group leaves without changing statistics"),
    "instance-norm": Case(
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8, dead=DEAD), n=nn.InstanceNorm2d(8), c=conv(8, 4, padding=1)),
        IMAGE, {"a": 5, "n.num_features": 5}, "a constant minus its mean is 0"),
    "layer-norm": Case(
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=linear(6, 8, DEAD), n=nn.LayerNorm(8), c=linear(8, 4)),
        TOKENS, {"a": 8}, "all channels are in the statistics"),
    "feed-forward": Case(
        lambda: Net(lambda m, x: x + m.c(F.gelu(m.a(x))), a=linear(6, 12, DEAD, 0.5), c=linear(12, 6)),
        TOKENS, {"a": 9}, "gelu(0.5) becomes the bias of the next layer"),
    "prelu": Case(
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8, dead=DEAD, bias=-0.5), n=nn.PReLU(8), c=conv(8, 4)),
        IMAGE, {"a": 5, "n.num_parameters": 5}, "a slope per channel"),
    "layer-scale": Case(
        lambda: Net(lambda m, x: m.c(m.a(x) * m.s.weight[:, None, None]), a=conv(3, 8), s=_vector(8, DEAD),
                    c=conv(8, 4, padding=1)),
        IMAGE, {"a": 5}, "a parameter that is 0"),
    "matmul-with-a-parameter": Case(
        lambda: Net(lambda m, x: torch.matmul(m.a(x).relu(), m.s.weight.t()), a=linear(6, 8, DEAD), s=nn.Linear(8, 4)),
        TOKENS, {"a": 5}, "a linear layer written out"),
    "shared-layer": Case(
        lambda: Net(lambda m, x: m.b(m.a(m.a(x).relu()).relu()), a=linear(6, 6, [0, 1]), b=linear(6, 3)),
        (2, 6), {"a": 6}, "its inputs are the model's"),
    "shared-reader": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).relu()) + m.c(m.b(x).relu()), a=conv(3, 8, dead=DEAD, bias=0.5),
                    b=conv(3, 8, dead=DEAD, bias=0.5), c=conv(8, 4)),
        IMAGE, {"a": 5, "b": 5}, "one bias takes one constant, which both calls have"),
    "shared-reader-of-two-constants": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).relu()) + m.c(m.b(x).relu()), a=conv(3, 8, dead=DEAD, bias=0.5),
                    b=conv(3, 8, dead=DEAD, bias=0.6), c=conv(8, 4)),
        IMAGE, {"a": 8, "b": 8}, "one bias cannot take two"),
    "one-channel": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) * x, a=conv(3, 1, dead=[0], padding=1), b=conv(1, 3, padding=1)),
        IMAGE, {"a": 1}, "not a depthwise convolution, and the last channel stays"),
    "option-a-shortcut": Case(
        lambda: Net(lambda m, x: m.c(F.pad(m.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.b(m.a(x))), a=conv(3, 4, dead=[1]),
                    b=conv(4, 8, dead=[0, 3, 4], stride=2, padding=1), c=conv(8, 2, padding=1)),
        IMAGE, {"a": 3, "b": 7}, "channel 1 is channel 3 after the padding; the padded ones are counted in the code"),
}  # fmt: skip


def _writes_through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(-1).add_(1.0)
    return m.b(y)


def _squeeze_excite(m: nn.Module, y: Tensor) -> Tensor:
    return m.c(y * m.g(m.f(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid())


def _gate_by_chunk(m: nn.Module, x: Tensor) -> Tensor:
    value, gate = m.a(x).chunk(2, 1)
    return m.c(value * gate.sigmoid())


def _channel_shuffle(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(y.view(y.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2))


def _group_norm(groups: int, channels: int, dead: slice) -> nn.GroupNorm:
    layer = nn.GroupNorm(groups, channels)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer.weight[dead] = 0
    return layer


def _vector(size: int, dead: slice) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(size))
    with torch.no_grad():
        holder.weight[dead] = 0
    return holder


@pytest.mark.parametrize("name", CASES)
def test_exact_removal(name: str) -> None:
    case = CASES[name]
    model = case.make().eval()
    before = [p.clone() for p in model.parameters()]
    result = compact(model, torch.randn(case.shape), measure=False)
    for layer, expected in case.left.items():
        module, _, attribute = layer.partition(".")
        found = getattr(result.model, module)
        got = getattr(found, attribute) if attribute else found.weight.shape[0]
        if isinstance(found, nn.ConvTranspose2d):
            got = found.weight.shape[1]
        assert got == expected, f"{layer}: {case.reason}\n{result.report.explain()}"
    x = torch.randn(case.shape)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    attributes_match_weights(result.model)


def attributes_match_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
            assert module.bias is None or module.bias.shape == (module.out_channels,)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,)
