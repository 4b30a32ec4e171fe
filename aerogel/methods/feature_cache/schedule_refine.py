"""A schedule bettered by exchanges on the network as it is by now: decoded once more, after ranges or weights have changed. Ours.

T steps, N modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement
from aerogel.methods.feature_cache.policy import ScheduleRefiner
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero
from aerogel.runtime.feature_cache.budgets import Measure, budget_like
from aerogel.runtime.feature_cache.masks import Search
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState
from aerogel.runtime.feature_cache.trials import SearchedState, generating
from aerogel.runtime.policy_state import PolicyState, by_name

_CONFIRMING = 4
"""Times as many images as are searched on confirm an exchange: what rounding does to few of them is soon learned by heart."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ScheduleRefineState(SearchedState):
    """The better schedule, and what it was made of."""

    error_before: float
    """Error of the schedule before, from the noise that the search did not see."""
    changed: int
    """Entries (steps x modules) in which the two differ."""
    kept: Mapping[str, Tensor] = by_name()
    """Tensors of the state before, such as the scores of a router, which stay true."""


@dataclass(frozen=True)
class ScheduleRefine(ScheduleRefiner[ScheduleRefineState]):
    """Improves the schedule of the preceding caching policy at the same savings, and replaces that policy."""

    state: ClassVar[type[PolicyState]] = ScheduleRefineState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "teacher", "trajectories", "cached_modules", "schedule", "replays"})

    trials: CountOrZero = 400
    """Generations it may take, forked where they differ."""
    samples: Count = 32
    """Images that are made in each, of those that were recorded."""
    by: Measure = "macs"
    """Saving that stays as before: multiply-accumulates, or measured seconds of the modules."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Half a generation a trial, in both branches of guidance, and what confirms: made exactly, and as the schedule has it."""
        return CostEstimate(model_tokens=(self.trials + 4 * _CONFIRMING) * size.steps * self.samples * size.sample)

    def revise(self, network: Network, calls: Sequence[Call], before: ScheduleState) -> ScheduleRefineState:
        """Exchange cache entries where images of other noise gain by it too; raises AerogelError for calls of other steps."""
        schedule = Schedule.of(network, before)
        with generating(network, Trajectories.of(network, calls), self.samples) as generations:
            if generations.runs[0].steps != schedule.steps:
                raise AerogelError(
                    f"the schedule before schedule_refine is of {len(schedule.steps)} steps, the recorded generations have "
                    f"{len(generations.runs[0].steps)} others: record them with the steps that it was made for"
                )
            budget = budget_like(network, calls[0], schedule.computed_TN, self.by)
            search = Search(generations.trials, budget, self.trials, generations.others(_CONFIRMING))
            found_TN = search.swaps(schedule.computed_TN)
            found = generations.state(replace(schedule, computed_TN=found_TN))
            error_before = generations.unseen.error(schedule.computed_TN)
        changed = int((found_TN != schedule.computed_TN).sum())
        kept = {key: value for key, value in before.as_dict().items() if isinstance(value, Tensor)}
        return ScheduleRefineState(**vars(found), error_before=error_before, changed=changed, kept=kept)
