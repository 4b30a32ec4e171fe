"""Filters of convolutions leave for good, and the convolution that reads them is adjusted by least squares (arXiv:1608.08710)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aerogel.methods.structured.policy import StructuredPruning
from aerogel.model.narrowing import Narrowing, narrowing_of_filters
from aerogel.model.network import Network
from aerogel.model.structure.coupled import Kind


@dataclass(frozen=True)
class PruneConvFilters(StructuredPruning):
    """Removes filters between two convolutions of a block; the second one is adjusted by least squares on its patches.

    Where a group norm stands between them whole groups leave, so that those that stay are normalised as before; a batch norm is narrowed
    with its statistics. The share counts in groups there.
    """

    kind: ClassVar[Kind] = "filters"

    def staying(self, units: int) -> int:
        """Return the number of filters, or of groups of a group norm, that stay: at least one."""
        return max(1, units - round(self.share * units))

    def narrowing(self, network: Network) -> Narrowing:
        """Return what leaves, and the widths that the model is to remember; raises AerogelError where nothing can leave."""
        return narrowing_of_filters(network, self.staying, self.ignore)
