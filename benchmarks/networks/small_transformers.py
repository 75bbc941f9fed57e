"""Models of transformers in the smallest configurations that still have every part of the large ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Entry = tuple[str, Callable[[], nn.Module], Callable[[], Any]]  # family, model, inputs

_TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_HEADS = {**_DECODER, "head_dim": 4}
_ENCODER = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
_SEQUENCES = {
    **_TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
}
_BART = {**_SEQUENCES, "max_position_embeddings": 16}
_T5 = {**_TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_EXPERTS = {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SPEECH = {
    **_ENCODER,
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 10,
}


def _tokens(length: int = 6) -> Tensor:
    return torch.randint(3, 50, (2, length))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def _pairs() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens(5)}


def _masked_pairs() -> dict[str, Tensor]:
    inputs = _pairs()
    masks = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
    return inputs | {mask: torch.ones_like(inputs[ids]) for mask, ids in masks.items()}


def _mel() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": _tokens(5)}


def _wave() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


def _pixels(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def _model(name: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        model: nn.Module = getattr(library, name)(getattr(library, config)(**settings))
        return model

    return make


def _causal(prefix: str, settings: dict[str, Any]) -> Entry:
    return "language", _model(f"{prefix}ForCausalLM", f"{prefix}Config", settings), _text


def _clip() -> nn.Module:
    library = importlib.import_module("transformers")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, **_TOKENS, "projection_dim": 8, "max_position_embeddings": 16}
    vision = {**shared, "projection_dim": 8, "image_size": 32, "patch_size": 8}
    model: nn.Module = library.CLIPModel(
        library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )
    return model


def _resnet(library: Any) -> Any:
    return library.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip


def _detr() -> nn.Module:
    library = importlib.import_module("transformers")
    settings = {k: v for k, v in _SEQUENCES.items() if k not in _TOKENS and k != "decoder_start_token_id"}
    config = library.DetrConfig(**settings, num_queries=5, num_labels=4, backbone_config=_resnet(library))
    model: nn.Module = library.DetrForObjectDetection(config)
    return model


def _mask2former() -> nn.Module:
    library = importlib.import_module("transformers")
    backbone = library.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = library.Mask2FormerConfig(
        backbone_config=backbone, feature_size=16, mask_feature_size=16, hidden_dim=16, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=5, num_labels=4,
    )  # fmt: skip
    model: nn.Module = library.Mask2FormerForUniversalSegmentation(config)
    return model


def _sam() -> nn.Module:
    library = importlib.import_module("transformers")
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
        "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_dim": 32,
        "initializer_range": 0.02,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 16
    }  # fmt: skip
    model: nn.Module = library.SamModel(
        library.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )
    return model


def _prompted() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 64, 64), "input_points": 64 * torch.rand(1, 1, 2, 2)}


_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _HEADS),
    "mistral": ("Mistral", _HEADS),
    "qwen2": ("Qwen2", _DECODER),
    "qwen3": ("Qwen3", _HEADS),
    "gemma2": ("Gemma2", _HEADS),
    "phi3": ("Phi3", _DECODER),
    "gpt-neox": ("GPTNeoX", _ENCODER),
    "mixtral": ("Mixtral", {**_DECODER, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS),
    "gpt-oss": ("GptOss", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("Mamba", {**_TOKENS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}),
}

_OTHERS = "speech, detection and others"

MODELS: dict[str, Entry] = {
    **{name: _causal(prefix, settings) for name, (prefix, settings) in _CAUSAL.items()},
    "bert": (
        "language",
        _model("BertForSequenceClassification", "BertConfig", {**_ENCODER, "max_position_embeddings": 16}),
        _text,
    ),
    "modernbert": (
        "language",
        _model(
            "ModernBertForMaskedLM", "ModernBertConfig", {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2}
        ),
        _text,
    ),
    "t5": ("language", _model("T5ForConditionalGeneration", "T5Config", _T5), _pairs),
    "switch": (
        "language",
        _model(
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        ),
        _masked_pairs,
    ),
    "bart": (
        "language",
        _model("BartForConditionalGeneration", "BartConfig", {**_SEQUENCES, "max_position_embeddings": 16}),
        _pairs,
    ),
    "whisper": (
        _OTHERS,
        _model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {
                **_SEQUENCES,
                "max_source_positions": 20,
                "max_target_positions": 20,
                "num_mel_bins": 8,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
            },
        ),
        _mel,
    ),
    "wav2vec2": (_OTHERS, _model("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH), _wave),
    "hubert": (
        _OTHERS,
        _model("HubertModel", "HubertConfig", {**_SPEECH, "feat_extract_norm": "layer"}),
        _wave,
    ),
    "encodec": (
        _OTHERS,
        _model(
            "EncodecModel",
            "EncodecConfig",
            {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "codebook_size": 16},
        ),
        lambda: {"input_values": torch.randn(2, 1, 400)},
    ),
    "clip": (_OTHERS, _clip, lambda: {**_text(), "pixel_values": torch.randn(2, 3, 32, 32)}),
    "detr": (_OTHERS, _detr, _pixels(64)),
    "mask2former": (_OTHERS, _mask2former, _pixels(64)),
    "sam": (_OTHERS, _sam, _prompted),
    "mobilevit": (
        "attention and ConvNeXt",
        _model(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            {
                "image_size": 64,
                "hidden_sizes": [16, 20, 24],
                "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 32],
                "num_attention_heads": 2,
                "num_labels": 4,
            },
        ),
        _pixels(64),
    ),
    "swinv2": (
        "attention and ConvNeXt",
        _model(
            "Swinv2ForImageClassification",
            "Swinv2Config",
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "window_size": 4,
            },
        ),
        _pixels(32),
    ),
    "convnextv2": (
        "attention and ConvNeXt",
        _model(
            "ConvNextV2ForImageClassification",
            "ConvNextV2Config",
            {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 4},
        ),
        _pixels(32),
    ),
}
