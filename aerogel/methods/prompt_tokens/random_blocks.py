"""Blocks of a long prompt at random, the baseline that a rule has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.methods.prompt_tokens.policy import BlockPolicy
from aerogel.options import Seed
from aerogel.runtime.tokens.stage import Stage


@dataclass(frozen=True)
class RandomBlocks(BlockPolicy):
    """Drops blocks of a long prompt in stages at random, the same ones for prompts of the same length."""

    seed: Seed = 0
    """Seed of the draw."""

    def scores(self, stage: Stage, place_BK: Tensor, blocks: int) -> Tensor:
        """Draw, the same numbers at every stage."""
        random = torch.Generator().manual_seed(self.seed)
        return torch.rand(blocks, generator=random).to(place_BK.device).expand(len(place_BK), -1)
