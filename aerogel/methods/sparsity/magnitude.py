"""Magnitude pruning: the smallest weights become zero (arXiv:1506.02626); no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aerogel.layers.conv import matrix
from aerogel.methods.sparsity.policy import Compared, PruningMethod
from aerogel.model.block import Block


@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Sets the smallest weights of each layer to zero: a share of them, or all but N of every M (arXiv:1506.02626)."""

    reads_calls: ClassVar[bool] = False

    compared: Compared = "layer"
    """Weights that are compared: those of a layer, or those of one output (row)."""

    def compress(self, block: Block) -> None:
        """Prune the block's layers."""
        for name, share in self.shares(block).items():
            self.prune(block, name, self.kept(matrix(block.module.get_submodule(name)).abs(), share, self.compared))  # type: ignore[arg-type]
