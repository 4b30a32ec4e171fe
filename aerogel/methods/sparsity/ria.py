"""RIA: prunes by relative importance, the part of a weight in its row and column, times a power of its input's norm (ICLR 2024).

Legend: O outputs, I inputs, G groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aerogel.layers.conv import Layer, matrix
from aerogel.methods.base import Before
from aerogel.methods.sparsity.policy import Compared, PruningMethod
from aerogel.model.block import Block
from aerogel.model.network import Network
from aerogel.model.row_permutation import movable, permute, rows_moved
from aerogel.numerics.channel_permutation import channel_order
from aerogel.options import Share


@dataclass(frozen=True)
class Ria(PruningMethod):
    """Sets weights to zero that are a small part of their row and column, weighed by their inputs (relative importance and activations)."""

    shares_calls: ClassVar[bool] = True

    exponent: Share = 0.5
    """Power of the norm of an input that multiplies the relative importance; 0 leaves inputs out of account."""
    compared: Compared = "layer"
    """Scores that are compared: those of a layer, or those of one output (row)."""

    permute: bool = True
    """With an N:M pattern, first put inputs into the order in which the pattern keeps most, where the layers that give them can follow."""

    @property
    def reorders(self) -> Literal["nothing", "layers"]:  # type: ignore[override]
        """Channels between layers, where inputs are put into another order."""
        return "layers" if self.runs is not None and self.permute else "nothing"

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for what every pruning method looks for; channels are followed now, while no call is under way."""
        yield from super().problems(network, before)
        if self.reorders == "layers":
            _ = network.edges

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Prune the block's layers, all by their inputs before any of them is pruned."""
        shares = self.shares(block)
        norms = self.input_norms(block, shares)
        scores = {name: self._score(block.module.get_submodule(name), norm) for name, norm in norms.items()}  # type: ignore[arg-type]
        moved = self._permute(block, scores) if self.reorders == "layers" else {}
        for name, score_OI in scores.items():
            facts = {"fallback": "pruned by relative importance alone: no token reached it"} if norms[name] is None else {}
            if self.reorders == "layers":
                facts["permutation"] = moved.get(name, "none: its inputs are not rows of a layer that could follow")
            self.prune(block, name, self.kept(score_OI, shares[name], self.compared), **facts)

    def _score(self, layer: Layer, norm: Tensor | None) -> Tensor:
        score_OI = relative_importance(matrix(layer).float().abs(), getattr(layer, "groups", 1))
        return score_OI if norm is None else score_OI * norm**self.exponent

    def _permute(self, block: Block, scores: dict[str, Tensor]) -> dict[str, str]:
        """Permute what the pruned layers read, and the scores with it; returns the layers that followed, by those that read them."""
        assert self.runs is not None, "there is a pattern"
        kept, of = self.runs
        moved: dict[str, str] = {}
        for edge in block.edges():
            readers = [name for name in edge.sinks if name in scores]
            layers = movable(block, edge) if readers else ()
            if not layers:
                continue
            score_OI = torch.cat([scores[name] for name in readers])
            order_I = block.processes.of_first(lambda score_OI=score_OI: channel_order(score_OI, kept, of).cpu())  # type: ignore[misc]
            permute(block.module, edge, layers, order_I)
            for name in readers:
                scores[name] = scores[name][:, order_I.to(score_OI.device)]
                moved[name] = f"with the rows of {', '.join(layers)}"
            scores.update({name: rows_moved(scores[name], edge, order_I) for name in layers if name in scores})
        return moved


def relative_importance(size_OI: Tensor, groups: int = 1) -> Tensor:
    """Return each magnitude as a share of its column plus as a share of its row; columns of a group are read by its outputs only."""
    size_GOI = size_OI.unflatten(0, (groups, -1))
    least = torch.finfo(size_OI.dtype).tiny  # of a column or a row of zeros, each zero is a share of nothing
    return (size_GOI / size_GOI.sum(1, keepdim=True).clamp(min=least) + size_GOI / size_GOI.sum(2, keepdim=True).clamp(min=least)).flatten(
        0, 1
    )
