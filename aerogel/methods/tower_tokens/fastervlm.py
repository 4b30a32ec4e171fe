"""FasterVLM: the tokens of an image stay that its class token attends to most (arXiv:2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aerogel.methods.tokens.policy import Budget
from aerogel.methods.tower_tokens.policy import TowerPolicy, count_of
from aerogel.numerics.token_selection import best
from aerogel.runtime.tokens.images import Chosen, Image


@dataclass(frozen=True)
class Fastervlm(TowerPolicy):
    """Ranks tokens by the attention of the class token, a mean over heads, in the block whose output the decoder gets.

    Without a class token by the attention that a token's patches receive from all patches.
    """

    keep: Budget = 0.5
    """Tokens of an image that stay: a number, or a share."""

    def choose(self, image: Image) -> Chosen | None:
        """Keep what is attended to most."""
        count = count_of(self.keep, image.score_P)
        if count == len(image.score_P):
            return None
        every_P = torch.ones_like(image.score_P, dtype=torch.bool)
        return Chosen(best(image.score_P[None], every_P[None], torch.tensor([count], device=every_P.device))[0])
