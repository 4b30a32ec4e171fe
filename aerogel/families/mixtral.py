"""Mixtral: Mistral whose MLPs are routed experts."""

from __future__ import annotations

from aerogel.model.family import Family, Residual

FAMILY = Family(
    name="mixtral",
    matches=("mixtral",),
    never_quantize=("*.mlp.gate",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.experts.*.w2"), "model.norm", "lm_head"),
)
