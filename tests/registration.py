"""The readers of this package among those of transformers and diffusers for a while: what comes later finds both libraries as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.quantizers import auto as diffusers_auto
from transformers.quantizers import auto as transformers_auto

import aerogel

_MAPPINGS: tuple[dict[str, Any], ...] = (
    transformers_auto.AUTO_QUANTIZER_MAPPING,
    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
    diffusers_auto.AUTO_QUANTIZER_MAPPING,
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
)


@contextmanager
def registrations_undone() -> Iterator[None]:
    """Take out again what is registered meanwhile."""
    before = [dict(mapping) for mapping in _MAPPINGS]
    try:
        yield
    finally:
        for mapping, entries in zip(_MAPPINGS, before, strict=True):
            mapping.clear()
            mapping.update(entries)


@contextmanager
def registered() -> Iterator[None]:
    """Register the readers with both libraries, and take them out again."""
    with registrations_undone():
        aerogel.register_transformers()
        aerogel.register_diffusers()
        yield
