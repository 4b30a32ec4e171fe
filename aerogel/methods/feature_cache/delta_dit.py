"""Delta-DiT: the rear blocks are left out while the outline forms, the front blocks while details do (arXiv:2406.01125).

The paper's block range and boundary could not be checked against code of its authors, which is not published: the defaults are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from aerogel.methods.feature_cache.policy import BlockCachePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, Share
from aerogel.runtime.feature_cache.block_cache import BlockCacheState, Rule, TableRule, block_cache_state


@dataclass(frozen=True)
class DeltaDit(BlockCachePolicy[BlockCacheState]):
    """Runs all blocks every `interval` steps, and skips a block range in between: the last blocks first, the first ones later."""

    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    interval: Count = 2
    """Steps from one at which all blocks run to the next."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of the blocks that is skipped."""
    boundary: Share = 0.5
    """Share of the steps, at the start, at which it is the last blocks."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> BlockCacheState:
        """Read the sampler's steps off the calls; raises AerogelError for options out of range."""
        return block_cache_state(network, Trajectories.of(network, calls))

    def rule(self, state: BlockCacheState) -> Rule:
        """Two block ranges, by the step."""
        blocks, steps = state.blocks, len(state.steps)
        long = max(1, round(self.share * blocks))
        outline = self.boundary * steps
        table = [None if step % self.interval == 0 else (0 if step < outline else 1) for step in range(steps)]
        return TableRule(((blocks - long, blocks), (0, long)), table)
