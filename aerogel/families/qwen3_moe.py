"""Qwen3-MoE: Qwen3 whose MLPs are routed experts, or dense in some layers."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="qwen3_moe",
    matches=("qwen3_moe",),
    never_quantize=("*.mlp.gate",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.experts.*.down_proj", "mlp.down_proj"), "model.norm", "lm_head"),
)
