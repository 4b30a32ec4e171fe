"""Global magnitude: one threshold on the magnitudes of all layers says what each of them loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aerogel.methods.allocation.policy import Targets, ThresholdMethod
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.allocation import Shares, by_threshold


@dataclass(frozen=True)
class GlobalMagnitude(ThresholdMethod):
    """Allocates to each layer the zeros that one magnitude threshold for all layers would make."""

    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the share of each layer below the common threshold."""
        weights = {name: layer.weight.detach() for name, layer in targets.layers.items()}
        return by_threshold(weights, sparsity, cap=self.max_sparsity)
