"""Tensors of a checkpoint that the model's class has no module for, such as those of multi-token prediction: they are kept as they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from aerogel.io.checkpoint import Checkpoint

_SHOWN = 3


@dataclass(frozen=True)
class Unbuilt:
    """Some tensors of a checkpoint, which nothing computes with here; engines that serve the model may."""

    checkpoint: Checkpoint
    names: tuple[str, ...]
    """As the checkpoint answers to them."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, built: Collection[str]) -> Unbuilt | None:
        """All tensors of a checkpoint but those of these names; None where there are no others."""
        names = tuple(name for name in checkpoint.names() if name not in built)
        return cls(checkpoint, names) if names else None

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return self.checkpoint.bytes(self.names)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The outermost modules, by their names on disk, in which nothing else lies."""
        return self._around(self.names)

    @property
    def told(self) -> str:
        """Those modules in a few words."""
        parts = self.parts
        return ", ".join(parts[:_SHOWN]) + (f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")

    @property
    def ignored(self) -> list[str]:
        """Patterns for the `ignore` of a quantization_config, of the modules that hold a matrix."""
        matrices = [name for name in self.names if len(self.checkpoint.shape(name)) > 1]
        return [f"re:{re.escape(part)}(\\.|$)" for part in self._around(matrices)]

    def _around(self, names: Sequence[str]) -> tuple[str, ...]:
        others = {self.checkpoint.on_disk(name) for name in self.checkpoint.names()} - {name for name, _ in self._on_disk()}
        used = {name[:place] for name in others for place, sign in enumerate(name) if sign == "."}
        found = []
        for name in map(self.checkpoint.on_disk, names):
            places = [place for place, sign in enumerate(name) if sign == "."]
            found.append(next((name[:place] for place in places if name[:place] not in used), name))
        return tuple(dict.fromkeys(found))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors by their names on disk, one in memory at a time."""
        for on_disk, name in self._on_disk():
            yield on_disk, self.checkpoint.tensor(name)

    def _on_disk(self) -> list[tuple[str, str]]:
        return [(self.checkpoint.on_disk(name), name) for name in self.names]
