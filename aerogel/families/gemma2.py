"""Gemma 2: norms with an offset of one before and after attention and MLP, soft-capped logits."""

from __future__ import annotations

from aerogel.model.family import Edge, Family

FAMILY = Family(
    name="gemma2",
    matches=("gemma2",),
    edges=(
        Edge("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Edge("self_attn.v_proj", ("self_attn.o_proj",), heads=True),
        Edge("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Edge("mlp.up_proj", ("mlp.down_proj",)),
    ),
    norm_offset=1.0,
    # No residual: what a block writes passes a norm before it is added, so the stream cannot be rotated through it.
)
