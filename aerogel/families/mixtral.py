"""Mixtral: Mistral whose MLPs are routed experts."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="mixtral",
    matches=("mixtral",),
    edges=(
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
        Edge("mlp.experts.*.w3", ("mlp.experts.*.w2",)),
    ),
    never_quantize=("*.mlp.gate",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.experts.*.w2"), "model.norm", "lm_head"),
)
