"""Llama and the language models built like it: Mistral, Qwen2, SmolLM, SmolLM3."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="llama",
    matches=("llama", "mistral", "qwen2", "smollm3"),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
