"""Models nobody here wrote, small and with random weights, some of whose filters are dead in all the ways
there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (2, 7))}


def resnet(layer_type: str) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=layer_type, num_labels=5
        )
    )


def regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetForImageClassification

    return RegNetForImageClassification(
        RegNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], groups_width=8, num_labels=5)
    )


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(
        MobileNetV2Config(
            image_size=32, depth_multiplier=0.25, min_depth=8, depth_divisible_by=4, num_labels=5
        )
    )


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=5, layer_scale_init_value=0.5
        )
    )


def efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=5
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                  image_size=32, patch_size=8, num_labels=5)
    )  # fmt: skip


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4,
                   num_labels=5)
    )  # fmt: skip


def segformer() -> nn.Module:
    """Its decoder reads hidden states that hooks of transformers collect."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
                        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
                        decoder_hidden_size=12, num_labels=4)
    )  # fmt: skip


def levit() -> nn.Module:
    """In eval mode its attention keeps a tensor with a graph, which `copy.deepcopy` refuses."""
    from transformers import LevitConfig, LevitForImageClassification

    return LevitForImageClassification(
        LevitConfig(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
                    key_dim=[8, 8, 8], num_labels=5, drop_path_rate=0,
                    down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]])
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                    intermediate_size=24, max_position_embeddings=16, use_cache=False)
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, use_cache=False,
                 feed_forward_proj="gated-gelu")
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=24, max_position_embeddings=16, num_labels=5)
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=24, use_cache=False,
                   bos_token_id=0, eos_token_id=0)
    )  # fmt: skip


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet-basic": (lambda: resnet("basic"), image),
    "resnet-bottleneck": (lambda: resnet("bottleneck"), image),
    "regnet": (regnet, image),
    "mobilenet-v2": (mobilenet_v2, image),
    "convnext": (convnext, image),
    "efficientnet": (efficientnet, image),
    "vit": (vit, image),
    "swin": (swin, image),
    "segformer": (segformer, lambda: image(64)),
    "levit": (levit, lambda: image(64)),
    "bert": (bert, tokens),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
    "t5": (t5, lambda: {**tokens(), "decoder_input_ids": torch.randint(0, 50, (2, 5))}),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for everything that is 0 or 1 after construction (norms, biases, layer scales), in eval
    mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float = 0.0, std: float = 0.3) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                normal(module.running_mean)
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            if (
                isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
                and module.weight is not None
            ):
                normal(module.weight, 1.0)
                normal(module.bias)
            elif getattr(module, "bias", None) is not None and isinstance(module.bias, nn.Parameter):
                normal(module.bias)
    return model.eval()


def kill(model: nn.Module, fraction: float = 0.5, seed: int = 0) -> nn.Module:
    """Zero a random part of the filters of every convolution and linear layer but the last, with the batch
    norm's gamma behind half of them (as `zero_small_filters` leaves them) and with its beta too behind a
    quarter."""
    generator = torch.Generator().manual_seed(seed)
    modules = [
        m
        for m in model.modules()
        if filters_of(m) is not None or isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    last = max(i for i, m in enumerate(modules) if filters_of(m) is not None)
    with torch.no_grad():
        for module, following in itertools.pairwise(modules[: last + 1]):
            filters = filters_of(module)
            if filters is None:
                continue
            dead = torch.rand(filters.shape[0], generator=generator) < fraction
            filters[dead] = 0
            if isinstance(following, nn.modules.batchnorm._BatchNorm) and len(following.weight) == len(dead):
                still = dead & (torch.rand(dead.shape, generator=generator) < 0.5)
                following.weight[still] = 0
                following.bias[still & (torch.rand(dead.shape, generator=generator) < 0.5)] = 0
            elif isinstance(module.bias, nn.Parameter):
                module.bias[dead & (torch.rand(dead.shape, generator=generator) < 0.5)] = 0
    return model


def filters_of(module: nn.Module) -> Tensor | None:
    """The weight with its filters first."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return module.weight
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return module.weight.transpose(0, 1) if module.groups == 1 else module.weight
    if type(module).__name__ == "Conv1D":
        return module.weight.t()
    return None


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def largest_difference(a: nn.Module, b: nn.Module, inputs: Any) -> float:
    return max(
        float((x - y).abs().max()) for x, y in zip(outputs(a, inputs), outputs(b, inputs), strict=True)
    )
