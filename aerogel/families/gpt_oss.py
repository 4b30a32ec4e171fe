"""GPT-OSS: attention with sinks and biases, experts with biases and a clamped gate."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="gpt_oss",
    matches=("gpt_oss",),
    never_quantize=("*.mlp.router",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.experts.*.down_proj"), "model.norm", "lm_head"),
)
