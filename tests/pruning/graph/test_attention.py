"""nn.MultiheadAttention and the transformer layers of torch: hidden units leave exactly, heads stay and the report says
why; in eval mode with and without the fast path, and in training mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffr_ext import Compaction, compact

WIDTH, HEADS, HIDDEN, DEAD = 8, 2, 16, 6
WHY = "nn.MultiheadAttention takes one number, embed_dim, for its queries and for all heads together"


def same_in_all_modes(result: Compaction, model: nn.Module, *inputs: Tensor) -> None:
    """The fast path runs where no gradient is wanted; training mode has its dropouts at 0."""
    small = result.model
    for training in (False, True):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                outputs = [m.train(training)(*inputs) for m in (small, model)]
            for came, expected in zip(*map(as_tuple, outputs), strict=True):
                torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-6)
    small.train()
    sum(t.square().sum() for t in as_tuple(small(*inputs))).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def dead_hidden(layer: Any, constant: float) -> Any:
    with torch.no_grad():
        layer.linear1.weight[:DEAD] = 0
        layer.linear1.bias[:DEAD] = constant
    return layer


# ------------------------------------------------------------------------------------------------------------
# Transformer layers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [0.0, 0.5])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_hidden_units_of_an_encoder_leave(
    activation: str, batch_first: bool, norm_first: bool, constant: float
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, 0.0, activation, batch_first=batch_first, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(dead_hidden(layer, constant), 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(6, WIDTH), encoder, nn.Linear(WIDTH, 3)).eval()
    x = torch.randn(2, 5, 6)
    result = compact(model, x, measure=False)
    for layer in result.model[1].layers:
        assert (layer.linear1.out_features, layer.linear2.in_features) == (HIDDEN - DEAD, HIDDEN - DEAD)
    same_in_all_modes(result, model, x)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_hidden_units_of_a_decoder_leave(batch_first: bool, norm_first: bool) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerDecoderLayer(
                WIDTH, HEADS, HIDDEN, 0.0, batch_first=batch_first, norm_first=norm_first
            )
            self.i, self.o = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
            self.d = nn.TransformerDecoder(dead_hidden(layer, 0.5), 2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.o(self.d(self.i(x), self.i(memory)))

    torch.manual_seed(0)
    model, inputs = Decoder().eval(), (torch.randn(2, 5, 6), torch.randn(2, 5, 6))
    result = compact(model, inputs, measure=False)
    assert [layer.linear1.out_features for layer in result.model.d.layers] == [HIDDEN - DEAD] * 2
    same_in_all_modes(result, model, *inputs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_an_encoder_are_passed_on(batch_first: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=batch_first)
            self.e = nn.TransformerEncoder(dead_hidden(layer, 0.0), 1, enable_nested_tensor=False)

        def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Tensor:
            return self.e(x, mask=mask, src_key_padding_mask=padding)

    torch.manual_seed(0)
    model = Masked().eval()
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[0, 2:] = True
    inputs = (torch.randn(4, 4, WIDTH), torch.zeros(4, 4, dtype=torch.bool), padding)
    result = compact(model, inputs, measure=False)
    assert result.model.e.layers[0].linear1.out_features == HIDDEN - DEAD
    same_in_all_modes(result, model, *inputs)


def test_the_whole_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, 0.0, batch_first=True).eval()
    for layer in (*model.encoder.layers, *model.decoder.layers):
        dead_hidden(layer, 0.3)
    inputs = (torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH))
    result = compact(model, inputs, measure=False)
    assert result.model.encoder.layers[0].linear1.out_features == HIDDEN - DEAD
    assert result.model.decoder.layers[0].linear1.out_features == HIDDEN - DEAD
    same_in_all_modes(result, model, *inputs)


# ------------------------------------------------------------------------------------------------------------
# nn.MultiheadAttention
# ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """`dead` names the channels that are: a head that nothing reads, one of zeros, features in front or behind."""

    def __init__(self, dead: str, cross: bool = False, need_weights: bool = False, **kw: Any) -> None:
        super().__init__()
        self.cross, self.need_weights = cross, need_weights
        self.q, self.o = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        if cross:
            self.k, self.v = nn.Linear(6, kw.get("kdim") or WIDTH), nn.Linear(6, kw.get("vdim") or WIDTH)
        self.m = nn.MultiheadAttention(WIDTH, 4, **kw)
        getattr(self, f"_kill_{dead}")()

    @torch.no_grad()
    def _kill_unread_head(self) -> None:
        self.m.out_proj.weight[:, :2] = 0

    @torch.no_grad()
    def _kill_head_of_zeros(self) -> None:
        own = self.m.v_proj_weight if self.m.in_proj_weight is None else self.m.in_proj_weight[2 * WIDTH :]
        own[2:4] = 0

    @torch.no_grad()
    def _kill_queries(self) -> None:
        self.q.weight[:3] = self.q.bias[:3] = 0

    @torch.no_grad()
    def _kill_keys_and_values(self) -> None:
        for layer in (self.k, self.v):
            layer.weight[:2] = layer.bias[:2] = 0

    @torch.no_grad()
    def _kill_results(self) -> None:
        self.m.out_proj.weight[:3] = 0
        if self.m.out_proj.bias is not None:
            self.m.out_proj.bias[:3] = 0.4

    def forward(self, x: Tensor) -> Any:
        q = self.q(x)
        k, v = (self.k(x), self.v(x)) if self.cross else (q, q)
        y, weights = self.m(q, k, v, need_weights=self.need_weights)
        return (self.o(y), weights) if self.need_weights else self.o(y)


FORMS: dict[str, dict[str, Any]] = {
    "self": {},
    "self-weights": {"need_weights": True},
    "self-no-bias": {"bias": False},
    "cross": {"cross": True},
    "cross-weights": {"cross": True, "need_weights": True},
    "cross-sizes": {"cross": True, "kdim": 5, "vdim": 7},
    "cross-sizes-weights": {"cross": True, "kdim": 5, "vdim": 7, "need_weights": True},
}


def attention(dead: str, form: str, batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    return Attention(dead, batch_first=batch_first, **FORMS[form]).eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dead", ["unread_head", "head_of_zeros"])
def test_heads_stay_and_the_report_says_why(dead: str, form: str, batch_first: bool) -> None:
    model, x = attention(dead, form, batch_first), torch.randn(2, 5, 6)
    result = compact(model, x, measure=False)
    assert WHY in result.report.explain()
    assert (result.model.m.embed_dim, result.model.m.num_heads) == (WIDTH, 4)
    assert result.report.parameters[0] == result.report.parameters[1]
    same_in_all_modes(result, model, x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_queries_keep_their_width_and_the_report_says_why(form: str, batch_first: bool) -> None:
    model, x = attention("queries", form, batch_first), torch.randn(2, 5, 6)
    result = compact(model, x, measure=False)
    assert result.model.q.out_features == WIDTH
    assert WHY in result.report.explain()
    same_in_all_modes(result, model, x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", ["cross-sizes", "cross-sizes-weights"])
def test_features_of_keys_and_values_leave_where_they_have_a_size_of_their_own(
    form: str, batch_first: bool
) -> None:
    model, x = attention("keys_and_values", form, batch_first), torch.randn(2, 5, 6)
    result = compact(model, x, measure=False)
    small = result.model
    assert (small.k.out_features, small.v.out_features, small.m.kdim, small.m.vdim) == (3, 5, 3, 5)
    same_in_all_modes(result, model, x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_answers_as_before_where_results_are_dead(form: str, batch_first: bool) -> None:
    """Constant results go into the next bias where the module's code lets them."""
    model, x = attention("results", form, batch_first), torch.randn(2, 5, 6)
    result = compact(model, x, measure=False)
    assert result.model.o.in_features == result.model.m.out_proj.weight.shape[0]
    same_in_all_modes(result, model, x)
