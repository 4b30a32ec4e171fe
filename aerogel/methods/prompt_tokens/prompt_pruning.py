"""Prompt pruning: blocks of a long prompt are dropped before several decoder blocks, by the attention that its end pays to them.

The idea, to drop hidden states in stages while the prompt is read, by blocks that are scored in finer ones, is SlimInfer's
(arXiv:2508.06447). Its algorithm is not public: scores, budgets and depths here are our reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from aerogel.methods.base import Before
from aerogel.methods.prompt_tokens.policy import Prompt, PromptPolicy, blocks_at, keeping, last_tokens
from aerogel.methods.tokens.policy import Budget, counts
from aerogel.model.network import Network
from aerogel.numerics.prompt_selection import Reduce, block_scores
from aerogel.numerics.token_selection import best
from aerogel.options import Count, CountOrZero, Share
from aerogel.runtime.tokens.shortening import Rule, Selection, Stage


@dataclass(frozen=True)
class PromptPruning(PromptPolicy):
    """Drops blocks of a long prompt in stages; the last tokens' attention in the decoder block that follows says which."""

    keep: tuple[Budget, ...] = (0.5, 0.25, 0.125)
    """Tokens of a prompt that stay after each stage, the first and the last ones among them: numbers, or shares."""
    at: tuple[Share, ...] = (0.33, 0.5, 0.67)
    """Depths of the stages, as shares of the decoder's blocks."""
    layers: tuple[CountOrZero, ...] = ()
    """Numbers of the decoder blocks before which tokens are dropped, instead of depths."""
    block: Count = 64
    """Tokens that stay or go together."""
    sub_block: Count = 16
    """Tokens that have one score, the mean of the attention paid to them; it divides the block."""
    sink: CountOrZero = 4
    """First tokens of a prompt, which always stay."""
    local: Count = 64
    """Last tokens of a prompt, which always stay."""
    q_window: Count = 32
    """Last tokens whose attention counts; at most `local`."""
    reduce: Reduce = "max"
    """Score of a block: the largest or the mean of those of its sub-blocks."""

    @property
    def last(self) -> int:
        """Number of last tokens of a prompt that always stay."""
        return self.local

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the numbers of budgets and stages, and the sizes."""
        if len(self.keep) != len(self.layers or self.at):
            yield f"keep has {len(self.keep)} budgets for {len(self.layers or self.at)} stages; give one for each"
        if self.block % self.sub_block:
            yield f"block is {self.block}, expected a multiple of sub_block, which is {self.sub_block}"
        if self.q_window > self.local:
            yield f"q_window is {self.q_window}, expected at most local, which is {self.local}: dropped tokens ask for nothing"
        yield from super().problems(network, before)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return a rule for each stage; where several stages fall on one block of a short decoder, the last counts."""
        blocks = self.layers or blocks_at(self.at, depth)
        return {block: partial(self.choose, budget) for block, budget in zip(blocks, self.keep, strict=False)}

    def choose(self, budget: float, stage: Stage) -> Selection | None:
        """Keep the blocks with the highest scores, as many as fit into the budget beside the tokens that stay anyway."""
        prompt = Prompt.of(stage)
        # What is left over behind the last whole block stays with the last tokens.
        blocks_B = (prompt.length_B - self.sink - self.local).clamp(min=0) // self.block
        blocks_B = blocks_B.masked_fill(prompt.length_B < self.min_length, 0)
        place_BK = prompt.index_BK - self.sink
        in_block_BK = (prompt.index_BK >= self.sink) & (place_BK < blocks_B[:, None] * self.block)
        always_B = prompt.length_B - blocks_B * self.block
        count_B = (counts(budget, prompt.length_B) - always_B).clamp(min=0) // self.block
        if bool((count_B * self.block >= in_block_BK.sum(1)).all()):
            return None
        received_BK = stage.probe().attention(last_tokens(stage, self.q_window)).mean((1, 2))
        place_BK = place_BK.masked_fill(~in_block_BK, -1)
        score_BG = block_scores(received_BK, place_BK, self.sub_block, self.block, int(blocks_B.max()), self.reduce)
        chosen_BG = best(score_BG, score_BG > -torch.inf, count_B)
        keep_BK = chosen_BG.gather(1, place_BK.clamp(min=0) // self.block)
        return keeping(stage, keep_BK, in_block_BK)
