"""ERK: layers keep in proportion to the density of an Erdős-Rényi graph of their shape (arXiv:1911.11134)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aerogel.methods.allocation.policy import AllocationMethod, Targets
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics import allocation
from aerogel.numerics.allocation import Shares
from aerogel.options import NonNegative


@dataclass(frozen=True)
class Erk(AllocationMethod):
    """Allocates zeros by the shapes of layers alone: large ones lose more (Erdős-Rényi kernel, arXiv:1911.11134)."""

    power: NonNegative = 1.0
    """Power of (sum of dimensions / product of dimensions) that a layer keeps in proportion to; 0 gives all layers the same share."""

    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the shares by the shapes."""
        return self._shares(targets, sparsity)

    def remarks(self, network: Network) -> Iterator[str]:
        """Say which layers stay dense; the shapes decide that."""
        found = self.targeted(network)
        dense = [name for name, share in self._shares(found, self.sparsity_of(network, found)).items() if share == 0]
        if dense:
            more = f" and {len(dense) - 1} other layers" if len(dense) > 1 else ""
            yield f"{dense[0]}{more} would keep more than all their weights and stay dense; the others make up for it"

    def _shares(self, targets: Targets, sparsity: float) -> Shares:
        return allocation.erk({name: tuple(layer.weight.shape) for name, layer in targets.layers.items()}, sparsity, self.power)
