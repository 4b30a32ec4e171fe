"""Qwen3: Llama with a norm on every query and key head."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="qwen3",
    matches=("qwen3",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
