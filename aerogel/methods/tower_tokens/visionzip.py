"""VisionZip: the tokens that the class token attends to most, and a few that take up the mean of all others (arXiv:2412.04467)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.methods.tokens.policy import Budget
from aerogel.methods.tower_tokens.policy import TowerPolicy, count_of
from aerogel.numerics.token_selection import means
from aerogel.runtime.tokens.images import Chosen, Image


@dataclass(frozen=True)
class Visionzip(TowerPolicy):
    """Keeps dominant tokens by the attention of the class token; contextual ones, evenly spaced among the others, take these up.

    Each other token goes to the contextual one whose key is most alike; that becomes its own row plus the mean of what went to it, as the
    published code has it. Rows are those of the tower where the projector works token by token, else those of the decoder. A contextual
    token has its own position.
    """

    dominant: Budget = 0.45
    """Dominant tokens of an image: a number, or a share. Published for 576: 162, 108, 54, without the class token."""
    contextual: Budget = 0.05
    """Contextual tokens of an image: a number, or a share. Published for 576: 30, 20, 10."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return budgets of which a tenth is contextual."""
        return {"dominant": round(0.9 * share, 4), "contextual": round(0.1 * share, 4)}

    def choose(self, image: Image) -> Chosen | None:
        """Choose and merge."""
        tokens, dominant = len(image.score_P), count_of(self.dominant, image.score_P)
        order_P = image.score_P.argsort(descending=True, stable=True)
        rest_R = order_P[dominant:].sort().values
        contextual = min(len(rest_R), count_of(self.contextual, image.score_P))
        if dominant + contextual >= tokens:
            return None
        keep_P = torch.zeros(tokens, dtype=torch.bool, device=order_P.device)
        keep_P[order_P[:dominant]] = True
        if not contextual:
            return Chosen(keep_P)
        target_T = rest_R[:: len(rest_R) // contextual][:contextual]
        keep_P[target_T] = True
        return Chosen(keep_P, taken_up(image.row_PC, image.key_PD, target_T, rest_R[~torch.isin(rest_R, target_T)]))


def taken_up(row_PC: Tensor, key_PD: Tensor, target_T: Tensor, other_O: Tensor) -> Tensor:
    """Return rows in which each target is itself plus the mean of the others whose key is most like its own."""
    unit_PD = torch.nn.functional.normalize(key_PD.float(), dim=-1)
    group_O = (unit_PD[other_O] @ unit_PD[target_T].T).argmax(1)
    changed_PC = row_PC.clone()
    changed_PC[target_T] += means(row_PC[other_O], group_O, len(target_T))
    return changed_PC
