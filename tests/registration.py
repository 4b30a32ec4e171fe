"""The reader of this package among those of transformers for a while: tests that come later find transformers as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers import auto

import aerogel


@contextmanager
def registered_in_transformers() -> Iterator[None]:
    """Register it, and take it out again."""
    mappings: tuple[dict[str, Any], ...] = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    aerogel.register_transformers()
    try:
        yield
    finally:
        for mapping, entries in zip(mappings, before, strict=True):
            mapping.clear()
            mapping.update(entries)
