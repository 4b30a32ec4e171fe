"""Shell completion of names: read from the folders of the package, without importing what they define."""

from __future__ import annotations

from collections.abc import Callable

from aerogel import catalog

Complete = Callable[[str], list[tuple[str, str]]]
SCHEMES = ("W4A16", "W4A16_G64", "W4A16_G32", "W3A16_G64", "W8A16_CHANNEL", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
"""The presets that are used most; any name of the form W<bits>A<bits> with its options is taken."""


def names(*kinds: str, suffix: str = "") -> Complete:
    """Return a function that completes the names of these kinds, each with its one line of explanation."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        cards = [catalog.card(kind, name) for kind in kinds for name in catalog.names(kind)]
        return [(f"{card.name}{suffix}", card.summary) for card in cards if card.name.startswith(incomplete)]

    return complete


def words(*known: str) -> Complete:
    """Return a function that completes these words."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(word, "") for word in known if word.startswith(incomplete)]

    return complete
