"""Dead channels around packed sequences leave as they do without packing: rows are packed, and channels are no rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_nets import DEAD, linear
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from ffr_ext import compact

LENGTHS = torch.tensor([5, 2, 3])


class Packed(nn.Module):
    """Eight channels, three of them constant, go into a recurrent layer; what of its result is read says `read`."""

    def __init__(
        self,
        layer: type[nn.RNNBase],
        read: str = "steps",
        batch_first: bool = True,
        in_order: bool = False,
        **kw: Any,
    ) -> None:
        super().__init__()
        self.read, self.batch_first, self.in_order = read, batch_first, in_order
        self.a = linear(6, 8, DEAD, 0.7)
        self.r = layer(8, 5, batch_first=batch_first, **kw)
        width = kw.get("proj_size", 0) or 5
        self.o = nn.Linear(width * (2 if kw.get("bidirectional") and read != "state" else 1), 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = h if self.batch_first else h.transpose(0, 1)
        packed = pack_padded_sequence(h, lengths, batch_first=self.batch_first, enforce_sorted=self.in_order)
        result, state = self.r(packed)
        if self.read == "state":
            return self.o((state[0] if isinstance(state, tuple) else state)[-1])
        if self.read == "rows":
            result = PackedSequence(self.o(result.data), *result[1:])
            return pad_packed_sequence(result, batch_first=True, padding_value=-1.0)[0]
        length = 7 if self.read == "more" else None
        steps = pad_packed_sequence(result, batch_first=self.batch_first, total_length=length)
        return self.o(steps[0])


def check(model: nn.Module, left: int, *others: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, 6), model.lengths if hasattr(model, "lengths") else LENGTHS)
    result = compact(model, inputs, measure=False)
    assert (result.model.a.out_features, result.model.r.input_size) == (left, left), result.report.explain()
    assert not result.report.unknown_ops
    for given in (inputs, (torch.randn(2, 4, 6), torch.tensor([4, 1])), *others):
        with torch.no_grad():
            torch.testing.assert_close(result.model(*given), model(*given), rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(m) for m in [*model.modules(), *result.model.modules()])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("read", ["steps", "more", "rows", "state"])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_constants_go_into_the_input_biases(layer: type[nn.RNNBase], read: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    check(Packed(layer, read, batch_first).eval(), 5)


@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2, "bidirectional": True}, {"proj_size": 3}, {"num_layers": 2, "dropout": 0.5}],
    ids=str,
)
def test_every_kind_of_layer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(Packed(nn.LSTM, **options).eval(), 5)


def test_without_biases_one_constant_carries_the_others() -> None:
    torch.manual_seed(0)
    check(Packed(nn.GRU, bias=False).eval(), 6)


def test_lengths_in_order() -> None:
    """enforce_sorted=True: no rows are moved, and nothing says how many sequences there are but the batches."""
    torch.manual_seed(0)
    model = Packed(nn.LSTM, in_order=True).eval()
    model.lengths = torch.tensor([5, 3, 2])
    check(model, 5)


def test_lengths_that_the_model_knows() -> None:
    class Fixed(Packed):
        def forward(self, x: Tensor, lengths: Any = None) -> Tensor:
            return super().forward(x, torch.tensor([x.shape[1]] * x.shape[0]))

    torch.manual_seed(0)
    model = Fixed(nn.GRU).eval()
    small = compact(model, torch.randn(2, 4, 6), measure=False).model
    assert small.r.input_size == 5
    x = torch.randn(3, 6, 6)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_list_of_sequences() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.o = linear(6, 8, DEAD), nn.GRU(8, 5), nn.Linear(5, 3)

        def forward(self, *sequences: Tensor) -> Tensor:
            packed = pack_sequence([self.a(s).relu() for s in sequences], enforce_sorted=False)
            return self.o(self.r(packed)[1][-1])

    torch.manual_seed(0)
    model = Listed().eval()
    inputs = (torch.randn(3, 6), torch.randn(5, 6))
    small = compact(model, inputs, measure=False).model
    assert small.r.input_size == 5
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


def test_a_state_that_is_given_stays() -> None:
    class Given(Packed):
        def __init__(self) -> None:
            super().__init__(nn.LSTM)
            self.b = linear(6, 5, DEAD)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            begin = self.b(x[:, 0])[None]
            packed = pack_padded_sequence(self.a(x).relu(), lengths, batch_first=True, enforce_sorted=False)
            return self.o(pad_packed_sequence(self.r(packed, (begin, begin))[0], batch_first=True)[0])

    torch.manual_seed(0)
    model = Given().eval()
    check(model, 5)
    report = compact(model, (torch.randn(3, 5, 6), LENGTHS), measure=False).report
    assert "a hidden size of lstm in r" in report.explain()


def test_padding_is_another_constant() -> None:
    """Behind pad_packed_sequence a constant channel is 0 in some steps: it stays where it is read as a constant."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o = linear(6, 8, DEAD, 0.7), linear(8, 8, DEAD, 0.7), nn.Linear(8, 3)
            self.r = nn.GRU(8, 8)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.a(x), lengths, batch_first=True, enforce_sorted=False)
            packed = PackedSequence(self.b(packed.data), *packed[1:])
            return self.o(pad_packed_sequence(packed, batch_first=True)[0])

    torch.manual_seed(0)
    model = Rows().eval()
    inputs = (torch.randn(3, 5, 6), LENGTHS)
    small = compact(model, inputs, measure=False).model
    assert (small.a.out_features, small.b.out_features) == (5, 8)
    torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
