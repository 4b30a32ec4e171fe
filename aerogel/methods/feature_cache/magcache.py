"""MagCache: all blocks are left out as long as calibrated changes of the residual's magnitude add up to little (arXiv:2506.09045).

T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.methods.feature_cache.policy import BlockCachePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, NonNegative, Share
from aerogel.runtime.feature_cache.block_cache import BlockCacheState, Rule, TableRule, block_cache_state, residuals
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class MagcacheState(BlockCacheState):
    """Measured ratios, and the table that follows from them."""

    ratios: Tensor
    """Mean magnitude of the residual against the step before (T); 1 at the first."""
    left_out: str
    """A 1 for each step that is left out, a 0 for each at which all blocks run."""


@dataclass(frozen=True)
class Magcache(BlockCachePolicy[MagcacheState]):
    """Skips all blocks and adds their cached residual, until the product of calibrated magnitude ratios is too far from 1."""

    state: ClassVar[type[PolicyState]] = MagcacheState
    search_space: ClassVar[SearchSpace | None] = ("threshold", (0.02, 0.04, 0.06, 0.09, 0.12, 0.18, 0.24, 0.4, 0.8, 2.0))

    threshold: NonNegative = 0.06
    """Largest sum of the product's distances from 1 since blocks ran last (diffusers: 0.06; the authors up to 0.24)."""
    longest: Count = 3
    """Most steps in a row that are left out."""
    retention: Share = 0.2
    """Share of the steps, at the start, at which all blocks run."""

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> MagcacheState:
        """Measure the ratios on the recorded generations; raises AerogelError for options out of range."""
        trajectories = Trajectories.of(network, calls)
        state = block_cache_state(network, trajectories)
        ratio_T, before = torch.zeros(len(state.steps)), torch.empty(0)
        for number, residual_BND in enumerate(residuals(network, trajectories)):
            step = number % len(ratio_T)
            norm_BN = residual_BND.float().norm(dim=-1)
            ratio_T[step] += 1.0 if step == 0 else (norm_BN / (before + 1e-8)).mean()
            before = norm_BN
        ratio_T /= ratio_T[0].clone()  # as many as there were generations
        return MagcacheState(**vars(state), ratios=ratio_T, left_out=left_out(ratio_T, self))

    def rule(self, state: MagcacheState) -> Rule:
        """Leave everything out at the steps that were found."""
        return TableRule(((0, state.blocks),), [0 if out == "1" else None for out in state.left_out])


def left_out(ratio_T: Tensor, options: Magcache) -> str:
    """Return a 1 for each step that is left out, a 0 for each at which all blocks run."""
    retained = int(options.retention * len(ratio_T) + 0.5)
    product, apart, row, found = 1.0, 0.0, 0, ""
    for step, ratio in enumerate(ratio_T.tolist()):
        if step >= max(retained, 1):
            product, row = product * ratio, row + 1
            apart += abs(1 - product)
        if step >= max(retained, 1) and apart <= options.threshold and row <= options.longest:
            found += "1"
        else:
            product, apart, row = 1.0, 0.0, 0
            found += "0"
    return found
