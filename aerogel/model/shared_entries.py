"""Tensors that a block writes for others into what it is given: mappings of shared keys and values (Gemma 3n and 4), caches (Pi0)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from aerogel.model.calls import tensors_in

Entries = list[tuple[int | str, Any, Any]]
"""The place or name of the argument, the key, and what was written."""


class Watched:
    """The arguments of one forward of a block, of which the entries are known that were written meanwhile."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._mappings = mappings_in(args, kwargs)
        self._before: dict[int | str, dict[Any, Any]] = {}
        self.written: Entries = []
        """Entries of the mappings that were not there before."""

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


def own_copy(value: Any) -> Any:
    """Return a copy of a mapping or of a cache, which a forward may write into; anything else as it is."""
    return copy.deepcopy(value) if _layers(value) is not None or isinstance(value, MutableMapping) else value


def tensors_kept_by(value: Any) -> list[Tensor]:
    """Return the tensors in a mapping or in the layers of a cache of transformers."""
    if isinstance(value, MutableMapping):
        return tensors_in(list(value.values()))
    return [kept for layer in _layers(value) or () for kept in vars(layer).values() if isinstance(kept, Tensor)]


def _layers(value: Any) -> Sequence[Any] | None:
    """The layers of a cache: objects that hold tensors of keys and values."""
    layers = getattr(value, "layers", None)
    return layers if isinstance(layers, list) and not isinstance(value, nn.Module) else None
