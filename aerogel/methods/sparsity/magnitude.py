"""Magnitude pruning: the smallest weights become zero (arXiv:1506.02626); no calibration.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer, matrix
from aerogel.methods.base import Before, Method, Requirement
from aerogel.model.block import Block
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.rounding import output_error
from aerogel.model.trace import NON_BLOCK
from aerogel.numerics.sparsity import kept_by_pattern, zero_share


@dataclass(frozen=True)
class Magnitude(Method):
    """Sets the smallest weights to zero: a share of each layer or of the whole model, or all but N of every M (arXiv:1506.02626)."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"uncached"})
    prunes: ClassVar[bool] = True

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the weights to set to zero; with an N:M pattern, 1 - N / M."""
    scope: Literal["layer", "global"] = "layer"
    """Weights that are compared: those of a layer (all layers get the same share), or those of all layers (one threshold)."""
    pattern: str = "unstructured"
    """Pattern of the zeros: anywhere (unstructured), or N:M such as 2:4, which keeps N of every M neighbouring inputs of a linear layer."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to act on: globs on full dotted names, `re:` patterns or class names (Linear, Conv2d)."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave alone; wins over targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "unstructured":
            return
        kept, of = self._kept_of()
        if abs(1 - kept / of - self.sparsity) > 1e-9:
            raise AerogelError(f"magnitude: {self.pattern} has sparsity {1 - kept / of:g}, not {self.sparsity:g}; set sparsity to that")
        if self.scope == "global":
            raise AerogelError(f"magnitude: {self.pattern} has the same share everywhere; leave scope: global out")

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for layers that are not quantized by then, and for one that does not fit the pattern."""
        layers = [found for found in self._layers(network) if found[0].full_name(found[1]) not in before.quantized]
        if not layers:
            yield "reaches no layer of this model that is not quantized by then; check its targets and ignore, or put it first"
        of = 1 if self.pattern == "unstructured" else self._kept_of()[1]
        for block, name, layer in layers:
            if of > 1 and (not isinstance(layer, nn.Linear) or layer.in_features % of):
                yield f"{block.full_name(name)} does not fit {self.pattern}: {layer} has no inputs in runs of {of}; ignore it"
                return

    @torch.no_grad()
    def apply(self, network: Network, calls: Sequence[Call]) -> None:
        """Prune in place."""
        layers = list(self._layers(network))
        for (block, name, layer), kept_OI in zip(layers, self._kept(layers), strict=True):
            weight_OI = matrix(layer)
            error = output_error(weight_OI.masked_fill(kept_OI, 0), weight_OI, None)
            block.prune(name, kept_OI)
            network.note(block.full_name(name), block.name, sparsity=zero_share(layer.weight), error=error)

    def _layers(self, network: Network) -> Iterator[tuple[Block, str, Layer]]:
        """Yield the float layers that are meant, with their blocks and their names in them."""
        for block_name, module in {**network.blocks(), NON_BLOCK: network.module}.items():
            block = Block(block_name, module, 0, 1, (), network)
            for name, layer in block.linears(self.targets, self.ignore).items():
                if isinstance(layer, Layer):
                    yield block, name, layer

    def _kept(self, layers: Sequence[tuple[Block, str, Layer]]) -> Iterator[Tensor]:
        """Return the kept_OI of each layer, one after another."""
        weights = [matrix(layer) for _, _, layer in layers]
        if self.pattern == "unstructured":
            return kept_by_share(weights, self.sparsity, self.scope)
        kept, of = self._kept_of()
        return (kept_by_pattern(weight_OI.float().abs(), kept, of) for weight_OI in weights)

    def _kept_of(self) -> tuple[int, int]:
        """Return N and M."""
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
        if found is None or int(found[1]) >= int(found[2]):
            raise AerogelError(f"magnitude: pattern is {self.pattern!r}, expected unstructured, or N:M with N below M such as 2:4")
        return int(found[1]), int(found[2])


def kept_by_share(weights: Sequence[Tensor], sparsity: float, scope: Literal["layer", "global"]) -> Iterator[Tensor]:
    """Yield where each weight is kept when exactly this share of each, or of all together, is pruned; of equal ones the first go."""
    threshold, ties = smallest(weights, round(sparsity * sum(weight.numel() for weight in weights))) if scope == "global" else (0.0, 0)
    for weight_OI in weights:
        if scope == "layer":
            threshold, ties = smallest([weight_OI], round(sparsity * weight_OI.numel()))
        size_OI = weight_OI.float().abs()
        equal_OI = size_OI == threshold
        first_OI = equal_OI & (equal_OI.flatten().cumsum(0).view_as(equal_OI) <= ties)
        ties -= int(first_OI.sum())
        yield (size_OI >= threshold) & ~first_OI


def smallest(weights: Sequence[Tensor], count: int) -> tuple[float, int]:
    """Return the magnitude of the `count`-th smallest of all weights, and how many of exactly this magnitude are among these.

    Two passes count the upper and then the lower 16 bits of float32, which have the order of the numbers: no list of all weights of a
    model is sorted.
    """
    below, found = 0, 0
    for upper in (True, False):
        counts = torch.zeros(1 << 16, dtype=torch.long)
        for weight in weights:
            bits = weight.float().abs().flatten().view(torch.int32)
            digits = bits >> 16 if upper else bits[bits >> 16 == found] & 0xFFFF
            counts += torch.bincount(digits, minlength=1 << 16).cpu()
        up_to = below + counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, count))
        below = int(up_to[digit] - counts[digit])
        found = (found << 16) + digit
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32)), count - below
