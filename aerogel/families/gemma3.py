"""Gemma 3 (text): Gemma 2 with norms on query and key heads in place of soft-caps."""

from __future__ import annotations

from aerogel.model.family import Family

FAMILY = Family(
    name="gemma3",
    matches=("gemma3_text",),
)
