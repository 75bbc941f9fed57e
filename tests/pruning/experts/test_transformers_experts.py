"""Mixtures of experts of transformers, as everybody calls them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from language_inputs import DECODER, text, tokens
from torch import Tensor, nn

from ffr_ext import compact

transformers = pytest.importorskip("transformers")


class ModuleListExperts(nn.Module):
    """Mixtral's experts as modules, as transformers had them up to version 4."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.act_fn = stacked.act_fn
        experts, width, hidden = stacked.down_proj.shape
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "w1": nn.Linear(width, hidden, bias=False),
                    "w2": nn.Linear(hidden, width, bias=False),
                    "w3": nn.Linear(width, hidden, bias=False),
                }
            )
            for _ in range(experts)
        )
        with torch.no_grad():
            for expert, up, down in zip(self.experts, stacked.gate_up_proj, stacked.down_proj, strict=True):
                expert["w1"].weight.copy_(up[:hidden])
                expert["w3"].weight.copy_(up[hidden:])
                expert["w2"].weight.copy_(down)

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, e in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            if token.shape[0] == 0:
                continue
            h = self.act_fn(e["w1"](x[token])) * e["w3"](x[token])
            out.index_add_(0, token, e["w2"](h) * weight[token, place, None])
        return out


def mixtral(form: str = "grouped_mm") -> nn.Module:
    """Expert i of layer l has 8 + i dead units from the i-th on, dead in one of the three ways there are."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            for i in range(4):
                for unit in range(i, 2 * i + 8):
                    if unit % 3 == 0:
                        experts.gate_up_proj[i, unit] = 0
                    elif unit % 3 == 1:
                        experts.gate_up_proj[i, 32 + unit] = 0
                    else:
                        experts.down_proj[i, :, unit] = 0
    if form == "modules":
        for layer in model.model.layers:
            layer.mlp.experts = ModuleListExperts(layer.mlp.experts)
    else:
        model.set_experts_implementation(form)
    return model


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_stacked_experts_lose_their_dead_units(form: str) -> None:
    """As many in each: the number of the expert with fewest."""
    model = mixtral(form)
    config = model.config.to_dict()
    result = compact(model, text(), measure=False)
    for layer in result.model.model.layers:
        assert layer.mlp.experts.gate_up_proj.shape == (4, 48, 16), result.report.explain()
        assert layer.mlp.experts.down_proj.shape == (4, 16, 24)
        assert layer.mlp.experts.intermediate_dim == 24
    assert model.config.to_dict() == result.model.config.to_dict() == config
    assert not result.report.unknown_ops
    prompt = tokens(5)
    written = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, result.model)]
    assert torch.equal(*written)


def test_experts_that_are_modules_lose_their_dead_units() -> None:
    model = mixtral("modules")
    inputs = text()
    result = compact(model, inputs, measure=False)
    for layer in result.model.model.layers:
        assert [e["w1"].out_features for e in layer.mlp.experts.experts] == [24, 23, 22, 21]
        assert [e["w2"].in_features for e in layer.mlp.experts.experts] == [24, 23, 22, 21]
    torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-6)


def test_a_loop_over_the_experts_that_get_tokens_loses_what_is_dead_in_all() -> None:
    """It reads the stack part by part. Experts 0 to 3 have the dead units 0..7, 1..9, 2..11 and 3..13."""
    model = mixtral("eager")
    result = compact(model, text(), measure=False)
    assert {layer.mlp.experts.intermediate_dim for layer in result.model.model.layers} == {32 - 5}
    (line,) = [note for note in result.report.notes if "experts" in note]
    assert "leave that are dead in all of them (each loses its own where" in line
    assert "set_experts_implementation('grouped_mm')" in line
    inputs = text()
    torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-6)


def switch_transformers() -> tuple[nn.Module, dict[str, Tensor]]:
    """Its router casts its own weights in the forward, its loop asks for experts by name, and without masks it makes
    its own only where nothing traces."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    sparse = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(vocab_size=50, pad_token_id=0, **sizes, **sparse)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for path, layer in model.named_modules():
            if expert := re.search(r"expert_(\d)\.wi$", path):
                layer.weight[: 10 + int(expert[1])] = 0
    ones = torch.ones(2, 6, dtype=torch.int64)
    return model, {
        "input_ids": tokens(),
        "decoder_input_ids": tokens(),
        "attention_mask": ones,
        "decoder_attention_mask": ones,
    }


def test_experts_in_a_loop_by_name_lose_their_dead_units() -> None:
    model, inputs = switch_transformers()
    result = compact(model, inputs, measure=False)
    left = [m.wi.out_features for path, m in result.model.named_modules() if re.search(r"expert_\d$", path)]
    assert left == 2 * [22, 21, 20, 19]
    inputs = {**inputs, "input_ids": tokens()}
    torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_mask_that_the_model_makes_only_without_a_trace_is_asked_for() -> None:
    model, inputs = switch_transformers()
    without = {name: value for name, value in inputs.items() if "mask" not in name}
    place = r"modeling_switch_transformers\.py:\d+, in forward: .*attention_mask"
    reason = rf"{place}.*give it in example_inputs \(attention_mask="
    with pytest.raises(ValueError, match=reason) as raised:
        compact(model, without, measure=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("form", "left"), [("grouped_mm", 24), ("batched_mm", 22)])
def test_interleaved_experts_with_biases_lose_their_dead_units(form: str, left: int) -> None:
    """gpt-oss: gate and up projection lie in turns, weights are [inputs, outputs], and every expert has biases. The
    strides of a grouped_mm are multiples of 16 bytes."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**DECODER, head_dim=4, num_local_experts=4, num_experts_per_tok=2)
    ).eval()
    model.set_experts_implementation(form)
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            experts.gate_up_proj_bias.normal_()
            experts.down_proj_bias.normal_()
            for i in range(4):
                gates = slice(2 * i, 2 * i + 20, 2)
                experts.gate_up_proj[i, :, gates] = experts.gate_up_proj_bias[i, gates] = 0
    inputs = text()
    result = compact(model, inputs, measure=False)
    for layer in result.model.model.layers:
        assert layer.mlp.experts.gate_up_proj.shape == (4, 16, 2 * left), result.report.explain()
        assert layer.mlp.experts.gate_up_proj_bias.shape == (4, 2 * left)
        assert layer.mlp.experts.down_proj.shape == (4, left, 16)
    assert not result.report.unknown_ops
    torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_other_mixtures(name: str) -> None:
    torch.manual_seed(0)
    settings = {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**settings)
    ).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[:, :8] = 0
    inputs = text()
    small = compact(model, inputs, measure=False).model
    assert [layer.mlp.experts.down_proj.shape[2] for layer in small.model.layers] == [24, 24]
    torch.testing.assert_close(small(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-6)


def test_mixtures_of_heads_are_named_too() -> None:
    """JetMoe: a split sends tokens to experts of its attention as well."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2}
    config = transformers.JetMoeConfig(**sizes, kv_channels=4, intermediate_size=32, num_local_experts=4)
    model = transformers.JetMoeForCausalLM(config).eval()
    inputs = text()
    result = compact(model, inputs, measure=False)
    (line,) = [note for note in result.report.notes if "experts" in note]
    assert "model.layers.0.self_attention.experts" in line
    assert "all experts stay, because" in line
    torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits)


def test_routed_experts_are_named_in_one_line() -> None:
    report = compact(mixtral(), text(), measure=False).report
    (line,) = [note for note in report.notes if "experts" in note]
    assert line.startswith(
        "model.layers.0.mlp.experts, model.layers.1.mlp.experts: all experts stay, because which"
    )
    assert line in str(report)
