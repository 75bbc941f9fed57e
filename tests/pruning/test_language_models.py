"""Models of transformers as everybody calls them: caches in the outputs, experts, saving and loading."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffr_ext import compact

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
ENCODER_DECODER = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}


def tokens(length: int = 6) -> Tensor:
    return torch.randint(50, (2, length))


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def both() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens(5)}


# name of the model and its config, further options, inputs, layers whose hidden units are dead -> what reads them
MODELS: dict[str, tuple[str, str, dict[str, Any], Any, str]] = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL, text, "gate_proj"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL, text, "gate_proj"),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL, text, "gate_proj"),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL, text, "dense_h_to_4h"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        both,
        "wi",
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", ENCODER_DECODER, both, "fc1"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **ENCODER_DECODER,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "num_mel_bins": 8,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        speech,
        "fc1",
    ),
}


def make(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model_class, config_class, settings, inputs, hidden = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**settings, **options)
    ).eval()
    with torch.no_grad():
        for path, layer in model.named_modules():
            if path.rpartition(".")[2] == hidden:
                layer.weight[:16] = 0
                if layer.bias is not None:
                    layer.bias[:16] = 0
    return model, inputs()


def hidden_units(model: nn.Module, name: str) -> set[int]:
    return {m.out_features for p, m in model.named_modules() if p.rpartition(".")[2] == MODELS[name][4]}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_compacted_as_everybody_calls_it(name: str) -> None:
    model, inputs = make(name)
    config = model.config.to_dict()
    assert model(**inputs).past_key_values is not None, "the cache is on by default"
    result = compact(model, inputs, measure=False)
    assert hidden_units(result.model, name) == {16}
    assert model.config.to_dict() == result.model.config.to_dict() == config
    assert not any("forward" in vars(m) for m in [*model.modules(), *result.model.modules()])
    torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-6)
    assert not any(op.startswith("cat") for op in result.report.unknown_ops), "a cache begins empty"


def test_the_compact_model_writes_the_same_text() -> None:
    """It fills and reads its own cache."""
    model, _ = make("qwen2")
    small = compact(model, text(), measure=False).model
    prompt = tokens(3)
    written = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, small)]
    assert torch.equal(*written)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_changes_nothing_of_the_plan(use_cache: bool) -> None:
    plans = [compact(*make("qwen2", use_cache=u), measure=False).plan for u in (use_cache, True)]
    assert plans[0].digest() == plans[1].digest()


def test_routed_experts_are_named_in_one_line() -> None:
    report = compact(mixtral(), text(), measure=False).report
    (line,) = [note for note in report.notes if "experts" in note]
    assert line.startswith(
        "model.layers.0.mlp.experts, model.layers.1.mlp.experts: all experts stay, because which"
    )
    assert line in str(report)


@dataclass
class Answer:
    """A class that no pytree knows."""

    scores: Tensor
    hidden: Any


class Answering(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight[:3] = 0
                layer.bias[:3] = 0

    def forward(self, x: Tensor) -> Answer:
        hidden = self.a(x).relu()
        return Answer(self.c(self.b(hidden).relu()), self.wrap(hidden))


@pytest.mark.parametrize(
    "wrap",
    [lambda t: t, lambda t: {"last": [t]}, lambda t: Answer(t, None)],
    ids=["attribute", "nested", "object in an object"],
)
def test_outputs_inside_a_class_that_export_cannot_return_are_outputs(wrap: Any) -> None:
    """They keep their channels; what is no output shrinks."""
    model = Answering(wrap).eval()
    result = compact(model, torch.randn(2, 4), measure=False)
    assert [result.model.a.out_features, result.model.b.out_features] == [8, 5]
    x = torch.randn(3, 4)
    torch.testing.assert_close(result.model(x).scores, model(x).scores)


def test_an_error_of_export_is_cut_to_its_reason_place_and_remedy() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool(x.sum() > 0) else x

    with pytest.raises(ValueError, match=r"torch\.export could not trace") as raised:
        compact(nn.Sequential(nn.Linear(2, 2), Branching()), torch.randn(1, 2))
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 700
    assert re.search(r"\(test_language_models\.py:\d+, in forward: return x \* 2 if", message)
    assert "the forward code branches on, or sizes a tensor by, the values of a tensor" in message


def test_the_recipe_loads_tied_weights_in_a_new_process(tmp_path: Path) -> None:
    """The saving and the loading block of the page, each in a process of its own."""
    page = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    make_it, save, load = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    after_save = """
        x = torch.arange(8)[None]
        torch.save((x, result.model(x).logits), "expected.pt")
    """
    after_load = """
        x, logits = torch.load("expected.pt", weights_only=True)
        assert torch.equal(small(x).logits, logits)
        assert [layer.mlp.gate_proj.out_features for layer in small.model.layers] == [48, 48]
        assert small.lm_head.weight is small.model.embed_tokens.weight
        assert small.config.intermediate_size == 64
    """
    for script in (
        make_it + save + textwrap.dedent(after_save),
        "import torch\n" + load + textwrap.dedent(after_load),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_from_pretrained_refuses_the_small_weights(tmp_path: Path) -> None:
    """As the page says: the config has one size for all layers."""
    model, inputs = make("qwen2")
    compact(model, inputs, measure=False).model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.Qwen2ForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Mixtures of experts
# ------------------------------------------------------------------------------------------------------------

OF_EXPERTS = {k: v for k, v in SMALL.items() if k != "head_dim"}


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
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**OF_EXPERTS, num_local_experts=4)
    ).eval()
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


def test_a_loop_over_the_experts_that_get_tokens_says_what_to_set() -> None:
    """torch.export cannot trace it, and transformers has another one that computes the same."""
    model = mixtral("eager")
    with pytest.raises(ValueError, match=r"modeling_mixtral\.py.*set_experts_implementation\('grouped_mm'\)"):
        compact(model, text(), measure=False)
    model.set_experts_implementation("grouped_mm")
    small = compact(model, text(), measure=False).model
    inputs = text()
    for each in (model, small):
        each.set_experts_implementation("eager")
    torch.testing.assert_close(small(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("form", "left"), [("grouped_mm", 24), ("batched_mm", 22)])
def test_interleaved_experts_with_biases_lose_their_dead_units(form: str, left: int) -> None:
    """gpt-oss: gate and up projection lie in turns, weights are [inputs, outputs], and every expert has biases. The
    strides of a grouped_mm are multiples of 16 bytes."""
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
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
    settings = {**OF_EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
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
