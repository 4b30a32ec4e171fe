"""Sizes of tiny language models, and text for them."""

from __future__ import annotations

from typing import Any

import torch

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 64, 128, 4, 2, 128

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "norm_topk_prob": True}


def text(number: int, generator: torch.Generator, *, length: int = 12) -> dict[str, Any]:
    """Two sequences; in every second call the shorter one is padded on the left."""
    ids = torch.randint(0, 112, (2, length + 2 * number), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : 3 * (number % 2)] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}
