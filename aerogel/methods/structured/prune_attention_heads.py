"""Attention heads leave for good, the same number in every layer, and the output projection is adjusted by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aerogel.methods.structured.policy import StructuredPruning
from aerogel.model.structure.coupled import Kind


@dataclass(frozen=True)
class PruneAttentionHeads(StructuredPruning):
    """Removes key-value heads with the query heads that share them; the output projection is adjusted by least squares."""

    kind: ClassVar[Kind] = "heads"

    def staying(self, units: int) -> int:
        """Return the number of key-value heads that stay: at least one."""
        return max(1, units - round(self.share * units))
