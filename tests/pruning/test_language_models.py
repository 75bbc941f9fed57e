"""Models of transformers as everybody calls them: caches in the outputs, saving and loading."""

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
from language_inputs import DECODER, text, tokens
from torch import Tensor, nn

from ffr_ext import compact

transformers = pytest.importorskip("transformers")

SMALL = {**DECODER, "head_dim": 4}
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
