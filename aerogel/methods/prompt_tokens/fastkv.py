"""FastKV: behind the middle of a decoder only the tokens of a long prompt go on that its end attends to (arXiv:2502.01068).

The rule of the public code, on the tokens of each row; heads of queries that share keys are averaged where the cache is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from aerogel.methods.base import Before
from aerogel.methods.kv_eviction.policy import window_scores
from aerogel.methods.prompt_tokens.policy import Prompt, PromptPolicy, blocks_at, keeping, last_tokens
from aerogel.methods.tokens.policy import Budget, counts
from aerogel.model.network import Network
from aerogel.numerics.prompt_selection import mean_pool
from aerogel.numerics.token_selection import best
from aerogel.options import Count, Share
from aerogel.runtime.tokens.eviction import Eviction, PromptEviction
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Fastkv(PromptPolicy):
    """Drops tokens of a long prompt once, by the attention of its last tokens, and cuts the cache of every block by its own."""

    keep: Budget = 0.2
    """Tokens of a prompt that go on, beside the last ones: a number, or a share."""
    at: Share = 0.5
    """Depth of the first block without the others, as a share of the decoder's blocks; the one before it is asked."""
    cache: Share = 0.1
    """Share of a prompt that stays in the cache of each block, the last tokens among them; 1 cuts nothing."""
    window: Count = 8
    """Last tokens, whose attention counts and which stay."""
    kernel: Count = 7
    """Neighbours over which scores are averaged; odd."""

    @property
    def last(self) -> int:
        """Number of last tokens of a prompt that always stay."""
        return self.window

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look at the kernel."""
        if self.kernel % 2 == 0:
            yield f"kernel is {self.kernel}, expected an odd number"
        yield from super().problems(network, before)

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the block before the first one without the others."""
        return tuple(block - 1 for block in blocks_at([self.at], depth))

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return dict.fromkeys(blocks_at([self.at], depth), self.choose)

    def choose(self, stage: Stage) -> Selection | None:
        """Keep the tokens with the highest scores, and the last ones."""
        prompt = Prompt.of(stage)
        may_go_BK = prompt.within(0, self.window) & (prompt.length_B >= self.min_length)[:, None]
        attention_BHRS = stage.watched[stage.block - 1].attention(last_tokens(stage, self.window))
        received_BK = attention_BHRS.sum((1, 2))[:, -may_go_BK.shape[1] :].masked_fill(~may_go_BK, 0)
        keep_BK = best(mean_pool(received_BK, self.kernel), may_go_BK, counts(self.keep, prompt.length_B))
        return keeping(stage, keep_BK, may_go_BK)

    def eviction(self) -> Eviction | None:
        """Return what cuts the cache."""
        if self.cache == 1:
            return None
        return PromptEviction(partial(window_scores, window=self.window, kernel=self.kernel, pool="mean"), self._count)

    def _count(self, positions: int) -> int:
        return positions if positions < self.min_length else max(self.window, round(self.cache * positions))
