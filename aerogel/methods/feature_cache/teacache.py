"""TeaCache: all blocks are left out until the estimated change of the output has added up (arXiv:2411.19108)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.policy import BlockCachePolicy, SearchSpace
from aerogel.model.calls import Call, tensors_in
from aerogel.model.hooks import capture_inputs
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, NonNegative
from aerogel.runtime.feature_cache.block_cache import BlockCacheState, BlockRange, Rule, block_cache_state
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class TeacacheState(BlockCacheState):
    """The polynomial that was fitted."""

    coefficients: tuple[float, ...]
    """Its coefficients, that of the lowest power first."""


@dataclass(frozen=True)
class Teacache(BlockCachePolicy[TeacacheState]):
    """Skips all blocks and adds their cached residual, while the estimated change of the output is small."""

    state: ClassVar[type[PolicyState]] = TeacacheState
    search_space: ClassVar[SearchSpace | None] = ("threshold", (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.0))

    threshold: NonNegative = 0.15
    """Sum of the estimated relative changes at which all blocks run again (the authors: 0.05 to 0.8, by model)."""
    degree: Count = 4
    """Of the polynomial from the input's relative change to the output's, which is fitted to the recorded generations."""

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> TeacacheState:
        """Fit the polynomial; raises AerogelError for options out of range and too few recorded steps."""
        trajectories = Trajectories.of(network, calls)
        state, runs = block_cache_state(network, trajectories), trajectories.runs
        pairs = sum(len(run.calls) - 1 for run in runs)
        if self.degree >= pairs:
            raise AerogelError(f"degree {self.degree} is not below the {pairs} recorded pairs of steps; lower it, or record more")
        first = next(iter(cached_modules_of(network)))
        inputs: list[float] = []
        outputs: list[float] = []
        seen: list[Tensor] = []
        with capture_inputs({first: network.module.get_submodule(first)}, lambda _, x: seen.append(x)):
            for run in runs:
                seen.clear()
                made = [tensors_in(network.run(call))[0] for call in run.calls]
                inputs += map(changed, seen[1:], seen)
                outputs += map(changed, made[1:], made)
        powers = torch.tensor(inputs, dtype=torch.float64)[:, None] ** torch.arange(self.degree + 1)
        fitted = torch.linalg.lstsq(powers, torch.tensor(outputs, dtype=torch.float64)[:, None], driver="gelsd").solution
        return TeacacheState(**vars(state), coefficients=tuple(fitted.flatten().tolist()))

    def rule(self, state: TeacacheState) -> Rule:
        """Add up what the polynomial says."""
        return _AddedUp(state.blocks, len(state.steps), state.coefficients, self.threshold)


def changed(now: Tensor, before: Tensor) -> float:
    """The relative L1 distance."""
    return float((now - before).abs().mean() / before.abs().mean())


class _AddedUp(Rule):
    watches: ClassVar[Literal["nothing", "modulated", "change"]] = "modulated"

    def __init__(self, blocks: int, steps: int, coefficients: Sequence[float], threshold: float) -> None:
        self._blocks, self._steps, self._coefficients, self._threshold = blocks, steps, coefficients, threshold
        self._sum = 0.0

    @property
    def ranges(self) -> tuple[BlockRange, ...]:
        return ((0, self._blocks),)

    def skipped_range(self, step: int, seen: Tensor | None) -> int | None:
        assert seen is not None, "it watches the input"
        before, self.kept = self.kept, seen
        if before is None or step in (0, self._steps - 1):
            self._sum = 0.0
            return None
        x = changed(seen, before)
        self._sum += max(0.0, sum(weight * x**power for power, weight in enumerate(self._coefficients)))
        if self._sum < self._threshold:
            return 0
        self._sum = 0.0
        return None
