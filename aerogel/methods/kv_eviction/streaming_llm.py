"""StreamingLLM: every token attends to the first tokens, the sinks, and to a window of the latest (arXiv:2309.17453)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from aerogel.methods.base import Before
from aerogel.methods.kv_eviction.policy import EvictionPolicy
from aerogel.model.network import Network
from aerogel.options import Count, CountOrZero
from aerogel.runtime.tokens.eviction import Eviction, SlidingWindow


@dataclass(frozen=True)
class StreamingLlm(EvictionPolicy):
    """Keeps the first tokens of a row and the latest ones in the cache, so that it stays as large however long the text is.

    A prompt is read as if it came token by token. Tokens keep their true positions; published code numbers what the cache holds anew.
    """

    window: Count = 256
    """Tokens that a token attends to, itself and the first ones among them."""
    sink: CountOrZero = 4
    """First tokens of a row, which stay."""

    @property
    def held(self) -> int:
        """Number of positions up to which nothing is evicted."""
        return self.window

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the first tokens and the window."""
        if self.sink >= self.window:
            yield f"sink is {self.sink}, expected less than window, which is {self.window}"

    def unsuitable(self, network: Network, calls: object) -> Iterator[str]:
        """Take any data: shorter texts lose nothing."""
        yield from ()

    def eviction(self) -> Eviction:
        """Return the rule."""
        return SlidingWindow(self.sink, self.window)
