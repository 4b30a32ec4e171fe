"""Qwen3-Next and Qwen3.5: Gated DeltaNet beside attention; the projections of its decay and its step stay in 16 bits."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="qwen3_next",
    matches=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    # A state that is carried over all tokens adds their errors up, and they are less than a hundredth of a layer.
    never_quantize=("*.linear_attn.in_proj_ba", "*.linear_attn.in_proj_a", "*.linear_attn.in_proj_b"),
)
