"""DeepSeek-V3: latent attention, a sigmoid router with groups of experts, shared experts beside the routed."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="deepseek_v3",
    matches=("deepseek_v3",),
    edges=(
        Edge("input_layernorm", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        Edge("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        Edge("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
        Edge(
            "post_attention_layernorm",
            (
                "mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.shared_experts.gate_proj",
                "mlp.shared_experts.up_proj", "mlp.gate_proj", "mlp.up_proj",
            ),
        ),
        Edge("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
        Edge("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    never_quantize=("*.mlp.gate",),
    residual=Residual(
        ("model.embed_tokens",),
        ("self_attn.o_proj", "mlp.experts.*.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj"),
        "model.norm",
        "lm_head",
        ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    ),
)  # fmt: skip
