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
from aerogel.numerics.prompt_selection import Reduce, block_scores, max_pool
from aerogel.options import Count
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.scores import QueryKey
from aerogel.runtime.tokens.stage import Observe, Positions, Stage

_PAID = "largest attention"
"""Name of the finding that later stages read."""


@dataclass(frozen=True)
class PromptPruning(BlockPolicy):
    """Drops blocks of a long prompt in stages; the last tokens' attention in the decoder block that follows says which."""

    sub_block: Count = 16
    """Tokens that have one score, the mean of the attention paid to them; it divides the block."""
    q_window: Count = 32
    """Last tokens whose attention counts; at most `local`."""
    attention: Reduce = "max"
    """Attention paid to a token: the largest that any last token paid it in any head of any block so far, or the mean over heads and last
    tokens in the block that follows."""
    kernel: Count = 33
    """Neighbours of which a token takes the largest attention, so that what stands around it stays too; odd, and 1 for none."""
    reduce: Reduce = "max"
    """Score of a block: the largest or the mean of those of its sub-blocks."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the sizes."""
        if self.block % self.sub_block:
            yield f"block is {self.block}, expected a multiple of sub_block, which is {self.sub_block}"
        if self.q_window > self.local:
            yield f"q_window is {self.q_window}, expected at most local, which is {self.local}: dropped tokens ask for nothing"
        if self.kernel % 2 == 0:
            yield f"kernel is {self.kernel}, expected an odd number"
        if self.attention == "max" and 0 in self.rules(decoder_of(network).depth):
            yield "no block has paid attention before block 0; give attention: mean, or a later stage"
        yield from super().problems(network, before)

    def observer(self) -> Observe | None:
        """Return what remembers the attention of each block where the largest counts."""
        return self.remember if self.attention == "max" else None

    def remember(self, positions: Positions, seen: QueryKey) -> None:
        """Raise what each token was paid so far to what it is paid in this block."""
        if positions.kind_BN.shape[1] < self.min_length:  # nothing will be asked
            return
        paid_BHRS = seen.attention(last_tokens(positions, self.q_window))
        paid_BK = paid_BHRS[..., -positions.kind_BK.shape[1] :].amax((1, 2))
        before_BN = positions.memory.setdefault(_PAID, paid_BK.new_zeros(positions.kind_BN.shape))
        positions.memory[_PAID] = before_BN.scatter_reduce(1, positions.kept.at_BK, paid_BK * positions.real_BK, "amax")

    def scores(self, stage: Stage, place_BK: Tensor, blocks: int) -> Tensor:
        """Return the attention that each block receives."""
        if self.attention == "max":
            received_BK = stage.kept.rows(stage.memory[_PAID])
        else:
            received_BK = stage.probe().attention(last_tokens(stage, self.q_window)).mean((1, 2))
        return block_scores(max_pool(received_BK, self.kernel), place_BK, self.sub_block, self.block, blocks, self.reduce)
