"""VisPruner: some tokens of an image by attention, and of the others those that are least alike (arXiv:2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.methods.tokens.policy import Budget
from aerogel.methods.tower_tokens.policy import TowerPolicy, count_of
from aerogel.options import Share
from aerogel.runtime.tokens.images import Chosen, Image


@dataclass(frozen=True)
class Vispruner(TowerPolicy):
    """Keeps a part by the attention of the class token, and drops of the others what has the most similar one, a few at a time."""

    keep: Budget = 0.5
    """Tokens of an image that stay: a number, or a share."""
    important: Share = 0.5
    """Share of them that attention chooses."""

    def choose(self, image: Image) -> Chosen | None:
        """Rank, and thin out what comes after the important ones."""
        tokens, count = len(image.score_P), count_of(self.keep, image.score_P)
        if count == tokens:
            return None
        order_P = image.score_P.argsort(descending=True, stable=True)
        important = int(self.important * count)
        rest = thinned(image.row_PC.float(), order_P[important:], count - important)
        keep_P = torch.zeros(tokens, dtype=torch.bool, device=order_P.device)
        keep_P[torch.cat([order_P[:important], rest])] = True
        return Chosen(keep_P)


def thinned(x_PC: Tensor, number_R: Tensor, count: int, at_once: int = 8) -> Tensor:
    """Return `count` of some tokens: every second one, by their order, is compared with the others, and the most alike of them go.

    At most `at_once` go before the rest is split anew.
    """
    unit_PC = torch.nn.functional.normalize(x_PC, dim=-1)
    while len(number_R) > count:
        one_A, other_B = number_R[::2], number_R[1::2]
        if not len(other_B):
            return number_R[:count]
        alike_A = (unit_PC[one_A] @ unit_PC[other_B].T).amax(1)
        going = min(at_once, len(number_R) - count, len(one_A))
        gone_A = alike_A.argsort(descending=True, stable=True)[:going]
        stays_R = torch.ones_like(number_R, dtype=torch.bool)
        stays_R[2 * gone_A] = False
        number_R = number_R[stays_R]
    return number_R
