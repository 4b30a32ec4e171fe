"""UniPrefill: blocks of a long prompt go that have the least of its end's attention, as many as hold little of it (arXiv:2605.06221).

The rule of the public code, on the tokens of each row. There tokens are dropped between attention and MLP, here before the next decoder
block: what is left computes the same, and the MLP of one block for the others is what that costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from aerogel.methods.prompt_tokens.policy import Prompt, PromptPolicy, blocks_at, keeping, last_tokens
from aerogel.numerics.prompt_selection import group_sums, smallest_mass
from aerogel.options import Count, CountOrZero, Share
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Uniprefill(PromptPolicy):
    """Keeps the fewest blocks of a prompt that hold a share of its last tokens' attention, at several depths."""

    # Attention gathers in few blocks: most of what is saved lies between .999 and .9.
    search_space: ClassVar[tuple[str, tuple[float, ...]] | None] = (
        "mass",
        (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.87, 0.83, 0.8, 0.7, 0.6, 0.5, 0.3, 0.0),
    )

    mass: Share = 0.99
    """Share of the attention that the blocks which stay hold together."""
    at: tuple[Share, ...] = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    """Depths of the first blocks without the others, as shares of the decoder's blocks; those before them are asked."""
    block: Count = 64
    """Tokens that stay or go together, of those that are left."""
    first: CountOrZero = 128
    """First tokens of what is left, which stay."""
    local: Count = 128
    """Last tokens of a prompt, which stay and whose attention counts."""

    @property
    def last(self) -> int:
        """Number of last tokens of a prompt that always stay."""
        return self.local

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the blocks before the first ones without the others."""
        return tuple(sorted({block - 1 for block in blocks_at(self.at, depth)}))

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return a rule for each depth."""
        return dict.fromkeys(blocks_at(self.at, depth), self.choose)

    def choose(self, stage: Stage) -> Selection | None:
        """Keep the blocks with most of the attention, the first tokens and the last ones."""
        real_BK, prompt = stage.real_BK, Prompt.of(stage)
        number_BK = (real_BK.cumsum(1) - 1).masked_fill(~real_BK, -1)
        left_B1 = stage.prompt_BK.sum(1, keepdim=True)
        long_B1 = (left_B1 > self.first + self.local) & (prompt.length_B[:, None] >= self.min_length)
        may_go_BK = (number_BK >= self.first) & (number_BK < left_B1 - self.local) & long_B1
        if not bool(may_go_BK.any()):
            return None
        received_BK = stage.watched[stage.block - 1].attention(last_tokens(stage, self.local)).mean((1, 2))[:, -real_BK.shape[1] :]
        group_BK = torch.where(real_BK, number_BK // self.block, -1)
        mass_BG, count_BG = group_sums(received_BK, group_BK, int(group_BK.max()) + 1)
        chosen_BG = smallest_mass(mass_BG, count_BG > 0, self.mass)
        return keeping(stage, chosen_BG.gather(1, group_BK.clamp(min=0)), may_go_BK)
