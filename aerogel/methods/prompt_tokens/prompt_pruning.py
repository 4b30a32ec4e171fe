"""Prompt pruning: blocks of a long prompt are dropped before several decoder blocks, by the attention that its end pays to them.

The idea, to drop hidden states in stages while the prompt is read, by blocks that are scored in finer ones, is SlimInfer's
(arXiv:2508.06447). Its algorithm is not public: scores, budgets and depths here are our reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from aerogel.methods.base import Before
from aerogel.methods.prompt_tokens.policy import BlockPolicy, last_tokens
from aerogel.model.network import Network
from aerogel.numerics.prompt_selection import Reduce, block_scores
from aerogel.options import Count
from aerogel.runtime.tokens.shortening import Stage


@dataclass(frozen=True)
class PromptPruning(BlockPolicy):
    """Drops blocks of a long prompt in stages; the last tokens' attention in the decoder block that follows says which."""

    sub_block: Count = 16
    """Tokens that have one score, the mean of the attention paid to them; it divides the block."""
    q_window: Count = 32
    """Last tokens whose attention counts; at most `local`."""
    reduce: Reduce = "max"
    """Score of a block: the largest or the mean of those of its sub-blocks."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the sizes."""
        if self.block % self.sub_block:
            yield f"block is {self.block}, expected a multiple of sub_block, which is {self.sub_block}"
        if self.q_window > self.local:
            yield f"q_window is {self.q_window}, expected at most local, which is {self.local}: dropped tokens ask for nothing"
        yield from super().problems(network, before)

    def scores(self, stage: Stage, place_BK: Tensor, blocks: int) -> Tensor:
        """Return the attention that each block receives."""
        received_BK = stage.probe().attention(last_tokens(stage, self.q_window)).mean((1, 2))
        return block_scores(received_BK, place_BK, self.sub_block, self.block, blocks, self.reduce)
