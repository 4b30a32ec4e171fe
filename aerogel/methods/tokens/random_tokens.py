"""Image tokens at random, the baseline that a rule has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from aerogel.methods.tokens.policy import Budget, TokenPolicy, keeping_best
from aerogel.options import CountOrZero, Seed
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class RandomTokens(TokenPolicy):
    """Keeps image tokens at random; where prompts have as many, the same ones, alone and in a batch."""

    keep: Budget = 0.5
    """Image tokens of a row that stay: a number, or a share."""
    layer: CountOrZero = 0
    """Number of the first block without the others."""
    seed: Seed = 0
    """Seed of the draw."""

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {self.layer: self.choose}

    def choose(self, stage: Stage) -> Selection | None:
        """Draw once, for the image tokens of every row by their number."""
        random = torch.Generator().manual_seed(self.seed)
        score_V = torch.rand(int(stage.vision_BK.sum(1).max()), generator=random).to(stage.kind_BK.device)
        return keeping_best(stage, score_V[(stage.vision_BK.cumsum(1) - 1).clamp(min=0)], self.keep)
