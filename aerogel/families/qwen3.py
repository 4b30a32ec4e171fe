"""Qwen3: Llama with a norm on every query and key head."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="qwen3",
    matches=("qwen3",),
    edges=(
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
