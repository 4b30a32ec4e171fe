"""Qwen2.5-VL: a vision encoder with windowed attention and fused qkv, and a Qwen2 language model."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="qwen2_5_vl",
    matches=("qwen2_5_vl",),
    modality="image-text",
)
