"""First-block cache: the first block says whether the others run (ParaAttention, cache-dit's DBCache; no paper)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before
from aerogel.methods.feature_cache.policy import BlockCachePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero, NonNegative
from aerogel.runtime.feature_cache.block_cache import BlockCacheState, BlockRange, Rule, block_cache_state


@dataclass(frozen=True)
class FirstBlock(BlockCachePolicy[BlockCacheState]):
    """Skips the blocks after the first ones while the residual of the first ones has changed little."""

    search_space: ClassVar[SearchSpace | None] = ("threshold", (0.02, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0))

    threshold: NonNegative = 0.05
    """Largest relative L1 distance between what the first blocks add now and then (diffusers: 0.05, cache-dit: 0.08)."""
    first: Count = 1
    """Blocks at the beginning that always run (cache-dit: 8)."""
    last: CountOrZero = 0
    """Blocks at the end that always run."""
    warmup: Count = 1
    """Steps at the start at which all blocks run (cache-dit: 8)."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> BlockCacheState:
        """Read the sampler's steps off the calls; raises AerogelError for options out of range."""
        self._require_room(network)
        return block_cache_state(network, Trajectories.of(network, calls))

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the blocks that always run with those of the model."""
        yield from reasons(lambda: self._require_room(network))

    def _require_room(self, network: Network) -> None:
        """Raise AerogelError where no block is left to be skipped."""
        if self.first + self.last >= (blocks := len(network.blocks())):
            raise AerogelError(f"first {self.first} and last {self.last} leave nothing of {blocks} blocks to be left out")

    def rule(self, state: BlockCacheState) -> Rule:
        """Compare with the last step at which all blocks ran."""
        return _Compared(self, state.blocks)


class _Compared(Rule):
    watches: ClassVar[Literal["nothing", "modulated", "change"]] = "change"

    def __init__(self, options: FirstBlock, blocks: int) -> None:
        self._options = options
        self._range = (options.first, blocks - options.last)

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        return (self._range,)

    def skipped_range(self, step: int, seen: Tensor | None) -> int | None:
        assert seen is not None, "it watches the change"
        if step >= self._options.warmup and self.kept is not None:
            apart = (seen - self.kept).abs().mean() / self.kept.abs().mean()
            if float(apart) <= self._options.threshold:
                return 0
        self.kept = seen
        return None
