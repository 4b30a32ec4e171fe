"""The base of allocation steps: which share of each layer the pruning steps behind are to set to zero."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from aerogel.errors import AerogelError, reasons
from aerogel.layers.conv import Layer
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from aerogel.numerics.allocation import Shares, from_bytes, require_met
from aerogel.options import Bytes


@dataclass(frozen=True)
class Targets:
    """The float layers that an allocation is about, by full name in the order of the network."""

    layers: Mapping[str, Layer]
    blocks: Mapping[str, str]
    """Names of the blocks that they are in."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each layer."""
        return {name: layer.weight.numel() for name, layer in self.layers.items()}


@dataclass(frozen=True)
class AllocationMethod(Method):
    """A step that changes no weight: it gives each layer the share that a later pruning step without a sparsity of its own takes."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"uncached"})
    allocates: ClassVar[bool] = True

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the weights of all layers together to set to zero; 0.5 where neither this nor budget_bytes is given."""
    budget_bytes: Bytes | None = None
    """Bytes of these layers instead of a sparsity: one bit for every weight, and the weights that are not zero in the model's own dtype."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to act on: globs on full dotted names, `re:` patterns or class names (Linear, Conv2d)."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave alone; wins over targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and self.budget_bytes is not None:
            name = type(self).__module__.rpartition(".")[2]
            raise AerogelError(f"{name}: sparsity and budget_bytes both say how much is pruned; give one of them")

    @abstractmethod
    def allocate(self, targets: Targets, sparsity: float, network: Network, calls: Sequence[Call]) -> Shares:
        """Return the share of zeros of each layer."""

    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Give each layer its share, and note it for the report."""
        found = self.targeted(network)
        sparsity = self.sparsity_of(network, found)
        shares = self.allocate(found, sparsity, network, calls)
        require_met(shares, found.sizes, sparsity)
        network.sparsities.update(shares)
        for name, share in shares.items():
            network.note(name, found.blocks[name], allocated=share)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for float layers, and for a budget that they can meet."""
        found = self.targeted(network, before)
        if not found.layers:
            yield "reaches no layer of this model that is not quantized by then; check its targets and ignore, or put it first"
            return
        yield from reasons(lambda: self.sparsity_of(network, found))

    def targeted(self, network: Network, before: Before | None = None) -> Targets:
        """Return the float layers that are meant, of those that are not quantized by then."""
        layers: dict[str, Layer] = {}
        blocks: dict[str, str] = {}
        for block in blocks_of(network):
            for name, layer in block.linears(self.targets, self.ignore).items():
                full = block.full_name(name)
                if isinstance(layer, Layer) and (before is None or full not in before.quantized):
                    layers[full], blocks[full] = layer, block.name
        return Targets(layers, blocks)

    def sparsity_of(self, network: Network, targets: Targets) -> float:
        """Return the share of zeros over all layers; raises AerogelError for bytes that cannot be met."""
        if self.budget_bytes is None:
            return 0.5 if self.sparsity is None else self.sparsity
        return from_bytes(targets.sizes, {name: _itemsize(network, layer) for name, layer in targets.layers.items()}, self.budget_bytes)


@dataclass(frozen=True)
class ThresholdMethod(AllocationMethod):
    """An allocation in which one level for all layers decides how much each of them loses."""

    max_sparsity: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Largest share of one layer; what a layer would lose beyond it, the others lose. At 1, one weight of each layer stays."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for a cap that leaves too little to prune, too."""
        found = list(super().problems(network, before))
        yield from found
        if not found and (sparsity := self.sparsity_of(network, self.targeted(network, before))) > self.max_sparsity:
            yield f"max_sparsity {self.max_sparsity:g} is below the sparsity {sparsity:g} of all layers together; raise it, or prune less"


def _itemsize(network: Network, layer: Layer) -> int:
    """Bytes of one weight on disk."""
    dtype: torch.dtype = network.stored_dtype or layer.weight.dtype
    return dtype.itemsize
