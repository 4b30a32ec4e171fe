"""Rotary embeddings of a decoder, as its configuration describes them."""

from __future__ import annotations

from typing import Any, NamedTuple


class Rotary(NamedTuple):
    """Kind of rotary embedding."""

    kind: str | None
    """Its type, such as "default" or "yarn"; None where the decoder has none."""
    has_axes: bool
    """True where positions have axes of their own for time, rows and columns."""
    turns_all: bool
    """True where all channels of a head are turned."""


def rotary_of(config: Any) -> Rotary:
    """Return what the configuration of a model says of its decoder."""
    decoder = config.get_text_config()
    said = getattr(decoder, "rope_parameters", None) or {}
    turns_all = said.get("partial_rotary_factor", 1.0) == 1.0 and not getattr(decoder, "qk_rope_head_dim", None)
    return Rotary(said.get("rope_type"), "mrope_section" in said, turns_all)
