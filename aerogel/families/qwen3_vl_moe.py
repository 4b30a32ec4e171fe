"""Qwen3-VL-MoE: a vision encoder with fused qkv whose features also enter early layers, and a Qwen3-MoE language model."""

from __future__ import annotations

from aerogel.model.family import Edge, Family

FAMILY = Family(
    name="qwen3_vl_moe",
    matches=("qwen3_vl_moe",),
    edges=(
        Edge("norm1", ("attn.qkv",)),
        Edge("attn.qkv", ("attn.proj",), heads=True, tail=True),
        Edge("norm2", ("mlp.linear_fc1",)),
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge(
            "post_attention_layernorm",
            ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate_proj", "mlp.up_proj"),
        ),
        Edge("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    never_quantize=("*.mlp.gate",),
    modality="image-text",
)
