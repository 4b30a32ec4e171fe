"""DuCa: between full steps, ToCa's steps and steps that reuse everything take turns (arXiv:2412.18911)."""

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
from aerogel.options import NonNegative
from aerogel.runtime.feature_cache.partial_token_cache import (
    TokenCacheConfig,
    TokenCacheState,
    caching_tokens,
    require_scored,
    token_cache_state,
)
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True)
class Duca(TokenCacheConfig, SchedulePolicy[TokenCacheState]):
    """Runs all modules at some steps; in between it returns cached outputs, and recomputes important tokens at every second step."""

    state: ClassVar[type[PolicyState]] = TokenCacheState
    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    ratio: NonNegative = 0.05
    """Share of the tokens that these steps compute anew, before the factors below (PixArt: 0.75)."""
    late: float = 2.0
    """At step i the share is multiplied by 1 + late - 2 x late x i / T, from 0 on."""
    front: float = -0.2
    """In block b of those numbered 0 to last it is multiplied by 1 + front - 2 x front x b / last."""
    bonus: NonNegative = 0.8
    """The best token of each cell of the image has its score raised by this share of it, so that all of the image is served."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for attention that scores just the tokens of each module."""
        yield from reasons(lambda: require_scored(network, self))

    def calibrate(self, network: Network, calls: Sequence[Call]) -> TokenCacheState:
        """Read the sampler's steps off the calls; raises AerogelError for options out of range, and where no attention scores tokens."""
        return token_cache_state(network, Trajectories.of(network, calls), self, lambda ahead: ahead % 2 == 1)

    def on(self, network: Network, state: TokenCacheState) -> AbstractContextManager[Any]:
        """Reuse by the table, with some tokens computed anew."""
        return caching_tokens(network, state, self)
