"""Pruning of the layers of a block: how many weights become zero and in which pattern; a method says which ones.

Legend: O outputs, I inputs, R x C blocks of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from aerogel.errors import AerogelError
from aerogel.layers.conv import Layer, matrix
from aerogel.methods.base import Before, Requirement, TargetedMethod, name_of
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.rounding import output_error
from aerogel.model.statistics import InputStatistics, collect
from aerogel.model.walk import blocks_of
from aerogel.numerics.sparsity import block_sums, kept_by_count, kept_by_pattern, kept_by_row, zero_share

Compared = Literal["layer", "row"]
"""Weights that are compared: all of a layer, or those of one output."""


@dataclass(frozen=True)
class PruningMethod(TargetedMethod):
    """A block method that sets weights of layers to zero, which every later step keeps."""

    layers: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d)
    prunes: ClassVar[bool] = True
    prunes_blocks: ClassVar[bool] = True
    """True where whole blocks can go by the sum of their scores."""
    reads_calls: ClassVar[bool] = True
    """True where it chooses weights by what the layers read."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    """Share of zeros of each layer (with an N:M pattern 1 - N / M); null: the share that an allocation step before it gave the layer."""
    pattern: str = "unstructured"
    """Pattern of the zeros: unstructured (anywhere), N:M such as 2:4 (keeps N of every M neighbouring inputs), or blocks such as 32x32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and not self.prunes_blocks:
            raise AerogelError(f"{name_of(self)}: blocks such as {self.pattern} are not pruned by it; give magnitude, wanda or ria, or N:M")
        if self.runs is None:
            return
        kept, of = self.runs
        share = 1 - kept / of
        if self.sparsity is None or abs(share - self.sparsity) > 1e-9:
            given = "null" if self.sparsity is None else f"{self.sparsity:g}"
            raise AerogelError(f"{name_of(self)}: {self.pattern} has sparsity {share:g}, not {given}; set sparsity to that")

    @property
    def requires(self) -> frozenset[Requirement]:  # type: ignore[override]
        """Calls where it looks at inputs, and an allocation step where that gives the shares."""
        needed: set[Requirement] = {"uncached"}
        if self.reads_calls:
            needed.add("calls")
        if self.sparsity is None:
            needed.add("allocation")
        return frozenset(needed)

    @property
    def runs(self) -> tuple[int, int] | None:
        """N and M of the pattern; None where it has none."""
        if self.pattern == "unstructured" or self.blocks is not None:
            return None
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern)
        if found is None or int(found[1]) >= int(found[2]):
            raise AerogelError(
                f"{name_of(self)}: pattern is {self.pattern!r}, expected unstructured, N:M with N below M (2:4), or blocks (32x32)"
            )
        return int(found[1]), int(found[2])

    @property
    def blocks(self) -> tuple[int, int] | None:
        """Outputs and inputs of the blocks of the pattern; None where it has none."""
        found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", self.pattern)
        return None if found is None else (int(found[1]), int(found[2]))

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for layers that are not quantized by then, and for one that does not fit the pattern."""
        found = ((block, name, layer) for block in blocks_of(network) for name, layer in self.targeted(block).items())
        layers = [(block.full_name(name), layer) for block, name, layer in found if block.full_name(name) not in before.quantized]
        if not layers:
            yield "reaches no layer of this model that is not quantized by then; check its targets and ignore, or put it first"
        outputs, inputs = self.blocks or (1, 1 if self.runs is None else self.runs[1])
        for full, layer in layers:
            if (outputs, inputs) == (1, 1):
                return
            shape = before.shapes.get(f"{full}.weight", layer.weight.shape)
            if not isinstance(layer, nn.Linear) or shape[1] % inputs or shape[0] % outputs:
                lacking = f"inputs in runs of {inputs}" if self.blocks is None else f"whole blocks of {outputs} outputs and {inputs} inputs"
                yield f"{full} does not fit {self.pattern}: its weight of {' x '.join(map(str, shape))} has no {lacking}; ignore it"
                return

    def share(self, block: Block, name: str) -> float | None:
        """Return the share of zeros that a layer gets; None for one that the allocation step before left out."""
        return self.sparsity if self.sparsity is not None else block.network.sparsities.get(block.full_name(name))

    def kept(self, score_OI: Tensor, share: float, compared: Compared = "layer") -> Tensor:
        """Return where a weight is kept by its scores: the least go, of equal ones the first.

        Among the weights of a layer the share is exact up to half a weight; among those of a row it is rounded down to whole weights. The
        same holds for blocks, which have the sum of their scores; a row of them is what some outputs read.
        """
        if self.runs is not None:
            return kept_by_pattern(score_OI, *self.runs)
        if self.blocks is not None:
            score_RC = block_sums(score_OI, *self.blocks)
            kept_RC = self._most(score_RC, share, compared)
            return kept_RC.repeat_interleave(self.blocks[0], 0).repeat_interleave(self.blocks[1], 1)
        return self._most(score_OI, share, compared)

    def _most(self, score_OI: Tensor, share: float, compared: Compared) -> Tensor:
        if compared == "row":
            return kept_by_row(score_OI, int(score_OI.shape[-1] * share))
        return kept_by_count(score_OI, round(share * score_OI.numel()))

    def shares(self, block: Block) -> dict[str, float]:
        """Return the share of zeros of each layer of a block that is pruned; notes those that no allocation step gave one."""
        found = {name: self.share(block, name) for name in self.targeted(block)}
        for name, share in found.items():
            if share is None:
                block.note(name, fallback="not pruned: the allocation step gave it no share")
        return {name: share for name, share in found.items() if share is not None}

    def input_norms(self, block: Block, names: Iterable[str]) -> dict[str, Tensor | None]:
        """Return the norm of each input of layers over all tokens, up to a constant, as a matrix of one row or of a row for each output.

        None for a layer that no token reached. Of a convolution, inputs are places of its kernel.
        """
        seen = collect(block, names, squares=True)
        return {name: _norm(block.module.get_submodule(name), seen.get(name)) for name in names}

    @torch.no_grad()
    def prune(self, block: Block, name: str, kept_OI: Tensor, **facts: Any) -> None:
        """Set a layer's weights to zero where `kept_OI` is False, and note its share of zeros and the relative error of the weight."""
        layer: Layer = block.module.get_submodule(name)  # type: ignore[assignment]
        weight_OI = matrix(layer)
        error = output_error(weight_OI.masked_fill(kept_OI, 0), weight_OI, None)
        block.prune(name, kept_OI)
        block.note(name, sparsity=zero_share(layer.weight), error=error, error_of="weights", **facts)


def _norm(layer: nn.Module, statistics: InputStatistics | None) -> Tensor | None:
    if statistics is None:
        return None
    norm_1I = statistics.mean_square().sqrt()[None]
    if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
        return norm_1I
    # Each group of outputs reads channels of its own.
    return norm_1I.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)
