"""The base of reconstruction steps: they adjust what pruning has left of a block's layers to what the original model gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from aerogel.layers.conv import Layer
from aerogel.methods.base import Before, Requirement, TargetedMethod
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of


@dataclass(frozen=True)
class ReconstructionMethod(TargetedMethod):
    """A block method on layers that an earlier step has pruned; their zeros stay zero."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "teacher", "teacher_layers", "uncached", "pruned"})

    targets: tuple[str, ...] = ("Linear", "Conv2d")
    """Layers to act on, of those that were pruned: globs on full dotted names, `re:` patterns or class names (Linear, Conv2d)."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for layers that are not quantized by then."""
        found = (block.full_name(name) for block in blocks_of(network) for name in self.targeted(block))
        if all(name in before.quantized for name in found):
            yield "reaches no layer of this model that is not quantized by then; check its targets and ignore, or put it first"

    def pruned(self, block: Block) -> dict[str, Layer]:
        """Return the float layers of the block that were pruned, by name in the block."""
        return {name: layer for name, layer in self.targeted(block).items() if block.full_name(name) in block.network.pruned}


def original_of(block: Block) -> Block:
    """Return the block of the original model."""
    assert block.original is not None, "the engine gives it to methods that need a teacher"
    return block.original
