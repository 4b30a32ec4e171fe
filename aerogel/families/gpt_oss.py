"""GPT-OSS: attention with sinks and biases, experts with biases and a clamped gate."""

from __future__ import annotations

from aerogel.model.family import Edge, Family, Residual

FAMILY = Family(
    name="gpt_oss",
    matches=("gpt_oss",),
    edges=(
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("post_attention_layernorm", ("mlp.router", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    ),
    never_quantize=("*.mlp.router",),
    residual=Residual(("model.embed_tokens",), ("self_attn.o_proj", "mlp.experts.*.down_proj"), "model.norm", "lm_head"),
)
