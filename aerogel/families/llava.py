"""LLaVA: a CLIP vision encoder and a Llama-like language model."""

from __future__ import annotations

from aerogel.model.family import Edge, Family

FAMILY = Family(
    name="llava",
    matches=("llava",),
    edges=(
        Edge("layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.out_proj",), heads=True),
        Edge("layer_norm2", ("mlp.fc1",)),
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    modality="image-text",
)
