"""Wanda: prunes by |weight| x norm of the input, within each output; no weight is changed otherwise (arXiv:2306.11695).

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.layers.conv import matrix
from aerogel.methods.sparsity.policy import PruningMethod
from aerogel.model.block import Block
from aerogel.numerics.sparsity import kept_by_row

_CLOSE, _HALVINGS = 0.001, 40
"""How near the share has to be, and how often the interval of alpha is halved at most."""


@dataclass(frozen=True)
class Wanda(PruningMethod):
    """Sets the weights of each output to zero whose magnitude times the norm of their input is smallest (arXiv:2306.11695)."""

    shares_calls: ClassVar[bool] = True

    variant: bool = False
    """Give each output its own share: the smallest scores go that add up to alpha times the output's sum, with alpha searched for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant and self.pattern != "unstructured":
            raise AerogelError(f"wanda: {self.pattern} has the same share in every output; leave variant or pattern out")

    @torch.no_grad()
    def compress(self, block: Block) -> None:
        """Prune the block's layers, all by their inputs before any of them is pruned."""
        shares = self.shares(block)
        for name, norm in self.input_norms(block, shares).items():
            score_OI = matrix(block.module.get_submodule(name)).float().abs()  # type: ignore[arg-type]
            fallback = {"fallback": "pruned by magnitude: no token reached it"} if norm is None else {}
            self.prune(block, name, self._kept(score_OI if norm is None else score_OI * norm, shares[name]), **fallback)

    def _kept(self, score_OI: Tensor, share: float) -> Tensor:
        return kept_by_sum(score_OI, share) if self.variant else self.kept(score_OI, share, "row")


def kept_by_sum(score_OI: Tensor, share: float) -> Tensor:
    """Return where a weight is kept when in each row the smallest scores go that add up to alpha times the row's sum.

    Alpha is found by halving an interval, from 0.4 in [0, 0.8], until this share of all weights goes within 0.001; where 0.8 is too little,
    the interval ends at 1.
    """
    ordered_OI = score_OI.double().sort(dim=-1, stable=True).values.cumsum(-1)

    def counts_for(alpha: float) -> Tensor:
        return (ordered_OI <= alpha * ordered_OI[:, -1:]).sum(-1)

    low, high = 0.0, 0.8 if int(counts_for(0.8).sum()) >= share * score_OI.numel() else 1.0
    for _ in range(_HALVINGS):
        alpha = (low + high) / 2
        counts_O = counts_for(alpha)
        off = int(counts_O.sum()) / score_OI.numel() - share
        if abs(off) <= _CLOSE:
            break
        low, high = (low, alpha) if off > 0 else (alpha, high)
    return kept_by_row(score_OI, counts_O)
