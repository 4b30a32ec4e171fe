"""Gemma 2: norms with an offset of one before and after attention and MLP, soft-capped logits."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="gemma2",
    matches=("gemma2",),
)
