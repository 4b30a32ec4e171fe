"""Phi-3: Llama with query, key and value in one linear, gate and up in another."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="phi3",
    matches=("phi3",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
