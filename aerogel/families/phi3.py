"""Phi-3: Llama with query, key and value in one linear, gate and up in another."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="phi3",
    matches=("phi3",),
    edges=(
        Edge("input_layernorm", ("self_attn.qkv_proj",)),
        Edge("self_attn.qkv_proj", ("self_attn.o_proj",), heads=True, tail=True),
        Edge("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Edge("mlp.gate_up_proj", ("mlp.down_proj",), tail=True),
    ),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
