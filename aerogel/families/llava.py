"""LLaVA: a CLIP vision encoder and a Llama-like language model."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="llava",
    matches=("llava",),
    modality="image-text",
)
