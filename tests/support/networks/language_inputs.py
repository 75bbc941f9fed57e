"""What small decoders of transformers are made of, and what they are called with."""

from __future__ import annotations

import torch
from torch import Tensor

DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tokens(length: int = 6) -> Tensor:
    return torch.randint(50, (2, length))


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}
