"""Entries that a block writes into mappings it is given: keys and values that later layers share, as in Gemma 3n and Gemma 4."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Self

Entries = list[tuple[int | str, Any, Any]]
"""The place or name of the argument, the key, and what was written."""


class Watched:
    """The arguments of one forward of a block, of which the entries are known that were written meanwhile."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._mappings = mappings_in(args, kwargs)
        self._before: dict[int | str, dict[Any, Any]] = {}
        self.written: Entries = []
        """What is in the mappings that was not there before."""

    def __enter__(self) -> Self:
        self._before = {place: dict(mapping) for place, mapping in self._mappings.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for place, mapping in self._mappings.items():
            before = self._before[place]
            self.written += [(place, key, value) for key, value in mapping.items() if before.get(key) is not value]


def mappings_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, MutableMapping[Any, Any]]:
    """Return the arguments that can be written into by key."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {place: value for place, value in given if isinstance(value, MutableMapping)}


def write(entries: Entries, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Write entries into the mappings among these arguments."""
    mappings = mappings_in(args, kwargs)
    for place, key, value in entries:
        mappings[place][key] = value
