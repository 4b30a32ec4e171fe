"""The latest blocks of a long prompt, a baseline that reads nothing of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.methods.prompt_tokens.policy import BlockPolicy
from aerogel.runtime.tokens.stage import Stage


@dataclass(frozen=True)
class RecentBlocks(BlockPolicy):
    """Drops blocks of a long prompt in stages, the earliest ones, whatever they hold; its first tokens stay."""

    def scores(self, stage: Stage, place_BK: Tensor, blocks: int) -> Tensor:
        """Count the blocks."""
        return torch.arange(blocks, device=place_BK.device).float().expand(len(place_BK), -1)
