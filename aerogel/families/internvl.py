"""InternVL: an InternViT encoder with layer scale, and any language model; here those of Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="internvl",
    matches=("internvl",),
    never_quantize=("*.mlp.gate",),
    modality="image-text",
)
