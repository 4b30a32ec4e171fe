"""LAMP: one threshold on magnitudes scaled by the energy above them in their own layer (arXiv:2010.07611)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aerogel.methods.allocation.policy import Targets, ThresholdMethod
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.allocation import Shares, by_threshold, lamp


@dataclass(frozen=True)
class Lamp(ThresholdMethod):
    """Allocates by one threshold on w^2 over the sum of the squares in its layer that are not smaller (arXiv:2010.07611)."""

    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the share of each layer below the common threshold of the scores."""
        weights = {name: layer.weight.detach() for name, layer in targets.layers.items()}
        return by_threshold(weights, sparsity, lamp, self.max_sparsity)
