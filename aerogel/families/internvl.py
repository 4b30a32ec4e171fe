"""InternVL: an InternViT encoder with layer scale, and any language model; here those of Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from aerogel.model.family import Edge, Family

FAMILY = Family(
    name="internvl",
    matches=("internvl",),
    edges=(
        Edge("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        Edge("attention.v_proj", ("attention.projection_layer",), heads=True),
        Edge("layernorm_after", ("mlp.fc1",)),
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
