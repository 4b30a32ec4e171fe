"""DeepSeek-V3: latent attention, a sigmoid router with groups of experts, shared experts beside the routed."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="deepseek_v3",
    matches=("deepseek_v3",),
    never_quantize=("*.mlp.gate",),
    residual=Residual(
        ("model.embed_tokens",),
        ("self_attn.o_proj", "mlp.experts.*.down_proj", "mlp.shared_experts.down_proj", "mlp.down_proj"),
        "model.norm",
        "lm_head",
        ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    ),
)  # fmt: skip
