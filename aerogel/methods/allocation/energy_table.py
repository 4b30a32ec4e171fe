"""Energy table: every layer loses the same share of its energy, the sum of its squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aerogel.methods.allocation.policy import Targets, ThresholdMethod
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.allocation import Shares, by_energy
from aerogel.options import Count


@dataclass(frozen=True)
class EnergyTable(ThresholdMethod):
    """Allocates so that every layer loses the same share of its sum of squares, read off a table of levels."""

    levels: Count = 1000
    """Levels of removed energy in the table, close together near zero."""

    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the shares at the level that meets the sparsity."""
        weights = {name: layer.weight.detach() for name, layer in targets.layers.items()}
        return by_energy(weights, sparsity, self.max_sparsity, self.levels)
