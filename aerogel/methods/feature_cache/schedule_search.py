"""A schedule found by trial: real generations say which reuse the final image minds least. Ours; exhaustive searches of this kind are slow.

T steps, N modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from aerogel.methods.base import CalibrationSize, CostEstimate
from aerogel.methods.feature_cache.policy import BudgetedCachePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.masks import Search
from aerogel.runtime.feature_cache.schedule import Schedule
from aerogel.runtime.feature_cache.trials import SearchedState, generating
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True)
class ScheduleSearch(BudgetedCachePolicy[SearchedState]):
    """Searches the schedule with the least error of the final images: complete steps first, then single modules, then exchanges."""

    state: ClassVar[type[PolicyState]] = SearchedState

    trials: CountOrZero = 2000
    """Generations it may take, forked where they differ."""
    samples: Count = 32
    """Images that are made in each, of those that were recorded."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Half a generation a trial, in both branches of guidance."""
        return CostEstimate(model_tokens=self.trials * size.steps * self.samples * size.sample)

    def calibrate(self, network: Network, calls: Sequence[Call]) -> SearchedState:
        """Search on the recorded generations; raises AerogelError when they do not replay or the budget cannot be met."""
        trajectories = Trajectories.of(network, calls)
        budget, modules = self.budget(network, trajectories), tuple(cached_modules_of(network))
        with generating(network, trajectories, self.samples) as generations:
            search, steps = Search(generations.trials, budget, self.trials), generations.runs[0].steps
            mask_TN = search.swaps(search.single_modules(search.whole_steps((len(steps), len(modules)))))
            return generations.state(Schedule(steps, trajectories.sampler, modules, mask_TN, trajectories.precision))
