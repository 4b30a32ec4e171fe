"""SnapKV: each head keeps what the last tokens of a prompt attend to, once the prompt is read (arXiv:2404.14469)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from aerogel.methods.base import Before
from aerogel.methods.kv_eviction.policy import EvictionPolicy, window_scores
from aerogel.methods.tokens.policy import Budget
from aerogel.model.network import Network
from aerogel.options import Count
from aerogel.runtime.tokens.eviction import Eviction, PromptEviction


@dataclass(frozen=True)
class Snapkv(EvictionPolicy):
    """Cuts the cache of a prompt head by head to the tokens that its last ones attend to most, with their neighbours.

    It acts on the forward that fills an empty cache; what comes later is kept. Heads of queries that share keys are averaged.
    """

    exact_prompt: ClassVar[bool] = True
    """Forwards of a prompt are not changed; what is read behind it is."""

    keep: Budget = 1024
    """Tokens of a prompt that stay, the last ones among them: a number, or a share."""
    window: Count = 32
    """Last tokens, whose attention counts and which stay."""
    kernel: Count = 7
    """Neighbours over which scores are pooled; odd."""
    pool: Literal["max", "mean"] = "max"
    """Pooling of scores."""

    @property
    def held(self) -> int:
        """Number of positions up to which nothing is evicted."""
        return self.keep if isinstance(self.keep, int) else 0

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the budget and the window."""
        if isinstance(self.keep, int) and self.keep < self.window:
            yield f"keep is {self.keep}, expected at least window, which is {self.window}"
        if self.kernel % 2 == 0:
            yield f"kernel is {self.kernel}, expected an odd number"

    def eviction(self) -> Eviction:
        """Return the rule."""
        return PromptEviction(partial(window_scores, window=self.window, kernel=self.kernel, pool=self.pool), self._count)

    def _count(self, positions: int) -> int:
        return self.keep if isinstance(self.keep, int) else max(self.window, round(self.keep * positions))
