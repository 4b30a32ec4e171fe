"""RIA: prunes by relative importance, the part of a weight in its row and column, times a power of its input's norm (ICLR 2024).


Legend: O outputs, I inputs, G groups of a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.layers.conv import matrix
from aerogel.methods.sparsity.policy import Compared, PruningMethod
from aerogel.model.block import Block
from aerogel.options import Share


@dataclass(frozen=True)
class Ria(PruningMethod):
    """Sets weights to zero that are a small part of their row and column, weighed by their inputs (relative importance and activations)."""

    shares_calls: ClassVar[bool] = True

    exponent: Share = 0.5
    """Power of the norm of an input that multiplies the relative importance; 0 leaves inputs out of account."""
    compared: Compared = "layer"
    """Scores that are compared: those of a layer, or those of one output (row)."""

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Prune the block's layers, all by their inputs before any of them is pruned."""
        shares = self.shares(block)
        for name, norm in self.input_norms(block, shares).items():
            layer = block.module.get_submodule(name)
            score_OI = relative_importance(matrix(layer).float().abs(), getattr(layer, "groups", 1))  # type: ignore[arg-type]
            fallback = {"fallback": "pruned by relative importance alone: no token reached it"} if norm is None else {}
            if norm is not None:
                score_OI *= norm**self.exponent
            self.prune(block, name, self.kept(score_OI, shares[name], self.compared), **fallback)


def relative_importance(size_OI: Tensor, groups: int = 1) -> Tensor:
    """Return each magnitude as a share of its column plus as a share of its row; columns of a group are read by its outputs only."""
    size_GOI = size_OI.unflatten(0, (groups, -1))
    least = torch.finfo(size_OI.dtype).tiny  # of a column or a row of zeros, each zero is a share of nothing
    return (size_GOI / size_GOI.sum(1, keepdim=True).clamp(min=least) + size_GOI / size_GOI.sum(2, keepdim=True).clamp(min=least)).flatten(
        0, 1
    )
