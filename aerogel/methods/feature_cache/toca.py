"""ToCa: between full steps, feed-forwards compute the tokens anew that attention says matter, and keep the others (arXiv:2410.05317)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from aerogel.errors import reasons
from aerogel.methods.base import Before
from aerogel.methods.feature_cache.policy import SchedulePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.partial_token_cache import (
    TokenCacheConfig,
    TokenCacheState,
    caching_tokens,
    require_scored,
    token_cache_state,
)
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True)
class Toca(TokenCacheConfig, SchedulePolicy[TokenCacheState]):
    """Runs all modules at some steps; in between attention is cached, and FFNs recompute their most important tokens."""

    state: ClassVar[type[PolicyState]] = TokenCacheState
    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for attention that scores just the tokens of each module."""
        yield from reasons(lambda: require_scored(network, self))

    def calibrate(self, network: Network, calls: Sequence[Call]) -> TokenCacheState:
        """Read the sampler's steps off the calls; raises AerogelError for options out of range, and where no attention scores tokens."""
        return token_cache_state(network, Trajectories.of(network, calls), self, lambda ahead: ahead > 0)

    def on(self, network: Network, state: TokenCacheState) -> AbstractContextManager[Any]:
        """Reuse by the table, with some tokens computed anew."""
        return caching_tokens(network, state, self)
