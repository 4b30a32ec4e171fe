"""Qwen2.5-VL: a vision encoder with windowed attention and fused qkv, and a Qwen2 language model."""

from __future__ import annotations

from aerogel.model.family import Edge, Family

FAMILY = Family(
    name="qwen2_5_vl",
    matches=("qwen2_5_vl",),
    edges=(
        Edge("norm1", ("attn.qkv",)),
        Edge("attn.qkv", ("attn.proj",), heads=True, tail=True),
        Edge("norm2", ("mlp.gate_proj", "mlp.up_proj")),
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    modality="image-text",
)
