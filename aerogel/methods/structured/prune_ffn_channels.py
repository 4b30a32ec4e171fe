"""FFN channels leave for good, the same number in every layer, and the layer that reads them is adjusted by least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aerogel.methods.structured.policy import StructuredPruning
from aerogel.model.structure.coupled import Kind
from aerogel.options import Count


@dataclass(frozen=True)
class PruneFfnChannels(StructuredPruning):
    """Removes intermediate channels of FFNs, rows of gate and up and columns of down, which is adjusted by least squares."""

    kind: ClassVar[Kind] = "feed_forwards"

    multiple: Count = 64
    """The number of channels that stay is rounded to the nearest multiple of this, for kernels and groups of quantization."""

    def staying(self, units: int) -> int:
        """Return the nearest multiple to the share of channels that stays: at least one multiple, and no more than there are."""
        if self.share == 0:
            return units
        return min(units, self.multiple * max(1, round((1 - self.share) * units / self.multiple)))
