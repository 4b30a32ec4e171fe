"""Qwen3-VL-MoE: a vision encoder with fused qkv whose features also enter early layers, and a Qwen3-MoE language model."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="qwen3_vl_moe",
    matches=("qwen3_vl_moe",),
    never_quantize=("*.mlp.gate",),
    modality="image-text",
)
