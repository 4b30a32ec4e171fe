"""Qwen3-MoE: Qwen3 whose MLPs are routed experts, or dense in some layers."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="qwen3_moe",
    matches=("qwen3_moe",),
    edges=(
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
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.experts.*.down_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
