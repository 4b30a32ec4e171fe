"""Normalised magnitude: one threshold on magnitudes over the L1 or L2 norm of their layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aerogel.methods.allocation.policy import Targets, ThresholdMethod
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.allocation import Shares, by_threshold, over_norm


@dataclass(frozen=True)
class LayerNormMagnitude(ThresholdMethod):
    """Allocates by one threshold on magnitudes that are divided by the L1 or L2 norm of their layer."""

    norm: Literal["l1", "l2"] = "l2"
    """Norm of a layer that its magnitudes are divided by."""

    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the share of each layer below the common threshold of the scores."""
        weights = {name: layer.weight.detach() for name, layer in targets.layers.items()}
        return by_threshold(weights, sparsity, over_norm(int(self.norm[1])), self.max_sparsity)
