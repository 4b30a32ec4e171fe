"""Bases of feature-caching policies: the schedule they act by, the dtype of what they cache, budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import Field

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call, tensors_in
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Share
from aerogel.runtime.feature_cache.block_cache import BlockCacheState, Rule, caching_blocks
from aerogel.runtime.feature_cache.budgets import Budget, Measure, budget_of, budget_of_ratio, require_one
from aerogel.runtime.feature_cache.cache_dtype import CacheDtype, cache_format
from aerogel.runtime.feature_cache.cached_modules import Costs, cached_modules_of, costs_of
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState, cache_bytes, caching
from aerogel.runtime.feature_cache.streams import FeatureCacheState
from aerogel.runtime.policy_state import PolicyState

SearchSpace = tuple[str, tuple[float, ...]]
"""An option, and values of it in order of what they save, the least first."""
Cached = TypeVar("Cached", bound=FeatureCacheState)
Scheduled = TypeVar("Scheduled", bound=ScheduleState)
Blocks = TypeVar("Blocks", bound=BlockCacheState)


@dataclass(frozen=True)
class FeatureCachePolicy(RuntimePolicy[Cached]):
    """Lets parts of a denoiser return what they gave at earlier steps."""

    skips_modules: ClassVar[bool] = True
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "trajectories", "cached_modules", "uncached"})

    search_space: ClassVar[SearchSpace | None] = None
    """Option that sets the saving, for the search for a speed-up; None where there is none."""
    rounds: ClassVar[bool] = True
    """True where cached tensors may be rounded to float8; False where a policy has its own `on`, unless it says so."""

    cache_dtype: CacheDtype = field(default="compute", kw_only=True)
    """Storage of cached tensors: the dtype they are computed in, or float8 (e4m3) with one scale a token."""

    @property
    def plain(self) -> bool:
        """True where it returns cached outputs by a schedule and does nothing else."""
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "on" in vars(cls) and "rounds" not in vars(cls):
            cls.rounds = False

    def __post_init__(self) -> None:
        super().__post_init__()
        cache_format(self.cache_dtype)
        if self.cache_dtype != "compute" and not self.rounds:
            name = name_of(self)
            raise AerogelError(f"{name} needs what it keeps as it was computed: set cache_dtype to compute, not {self.cache_dtype}")


class SchedulePolicy(FeatureCachePolicy[Scheduled]):
    """Lets attention and FFN modules return their cached outputs by a schedule, which is its state."""

    state: ClassVar[type[PolicyState]] = ScheduleState
    rounds: ClassVar[bool] = True

    @property
    def plain(self) -> bool:
        """True where it returns cached outputs by its schedule and does nothing else: its `on` is that of this class."""
        return type(self).on is SchedulePolicy.on

    def calibrated(self, network: Network, calls: Sequence[Call], before: PolicyState | None = None) -> Scheduled:
        """Calibrate; where it acts by its schedule alone, the state says what that saves."""
        # Before the schedule is made, which may take hours: what cannot be counted fails now.
        costs = costs_of(network, calls[0]) if self.plain and calls else None
        state = self._made(network, calls, before)
        if costs is None:
            return state
        return _with_savings(state, Schedule.of(network, state), costs, len(tensors_in((calls[0].args, calls[0].kwargs))[0]))

    def _made(self, network: Network, calls: Sequence[Call], before: PolicyState | None) -> Scheduled:
        return self.calibrate(network, calls)

    def on(self, network: Network, state: Scheduled) -> AbstractContextManager[Any]:
        """Reuse by the schedule; raises AerogelError when it is of other modules, and at steps that are not its own."""
        return caching(network, Schedule.of(network, state), store=self.cache_dtype)


class ScheduleRefiner(SchedulePolicy[Scheduled]):
    """Goes on from the schedule of the policy before it, which it takes the place of."""

    supersedes: ClassVar[bool] = True

    def refusal(self, before: RuntimePolicy[Any] | None) -> str:
        """Return the reason unless the policy before acts by its schedule alone."""
        if isinstance(before, FeatureCachePolicy) and before.plain:
            return ""
        behind = "there is no policy before it" if before is None else f"the policy before it is {name_of(before)}"
        return (
            f"{name_of(self)} goes on from a schedule of reuse, and {behind}; put one such as harmonica or schedule_search right before it"
        )

    def _made(self, network: Network, calls: Sequence[Call], before: PolicyState | None) -> Scheduled:
        if before is None:
            return self.calibrate(network, calls)
        assert isinstance(before, ScheduleState), "refusal() has seen to it"
        return self.revise(network, calls, before)

    def calibrate(self, network: Network, calls: Sequence[Call]) -> Scheduled:
        """Refuse: by itself it has nothing to go on from."""
        raise AerogelError(f"{name_of(self)} goes on from a schedule: put a policy that reuses by one before it")

    @abstractmethod
    def revise(self, network: Network, calls: Sequence[Call], before: ScheduleState) -> Scheduled:
        """Return the state that takes the place of the one before; that policy is off meanwhile."""


def _with_savings(state: Scheduled, schedule: Schedule, costs: Costs, samples: int) -> Scheduled:
    reused_TN = ~schedule.computed_TN[1:]  # nothing is kept before the first step
    saved = float((reused_TN.double() @ torch.tensor(costs.module_macs, dtype=torch.float64)).sum())
    return replace(
        state,
        macs=costs.macs / samples,
        macs_saved=saved / (len(schedule.steps) * costs.macs),
        cache_bytes=cache_bytes(schedule, costs.module_bytes) // samples,
    )


class BlockCachePolicy(FeatureCachePolicy[Blocks]):
    """Leaves out block ranges of a denoiser by a rule, and adds what they added before."""

    state: ClassVar[type[PolicyState]] = BlockCacheState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "trajectories", "block_range", "uncached"})
    rounds: ClassVar[bool] = True

    @abstractmethod
    def rule(self, state: Blocks) -> Rule:
        """A new rule, for one guidance stream of one run."""

    def on(self, network: Network, state: Blocks) -> AbstractContextManager[Any]:
        """Leave out blocks by the rule; raises AerogelError when the state is of another network, and at steps that are not its own."""
        return caching_blocks(network, state, partial(self.rule, state), self.cache_dtype)


@dataclass(frozen=True)
class BudgetedCachePolicy(SchedulePolicy[Scheduled]):
    """Reuses until an exact budget is met, so that the network stays close to what it was before any step of the recipe."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "teacher", "trajectories", "cached_modules", "replays", "uncached"})

    ratio: Share | None = None
    """Share of the schedule's entries (steps x modules) that return cached outputs; this or `target_speedup`."""
    target_speedup: Annotated[float, Field(ge=1)] | None = None
    """Speed-up of the denoiser to reach."""
    by: Measure = "latency"
    """Measure of the target speed-up: measured seconds of the modules, or their multiply-accumulates."""

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Look for one budget and count what a ratio asks for; what a speed-up asks for has to be measured."""
        yield from reasons(lambda: self.check_budget(network, before.size.steps))

    def check_budget(self, network: Network, steps: int) -> None:
        """Raise AerogelError unless one budget is given and, where it is a ratio, generations of so many steps can save as much."""
        require_one(self.ratio, self.target_speedup)
        if self.ratio is not None and steps > 1:
            self.check_ratio(budget_of_ratio(self.ratio, steps, len(cached_modules_of(network))), steps)

    def check_ratio(self, budget: Budget, steps: int) -> None:
        """Raise AerogelError where the method cannot save as much as a ratio asks for."""

    def budget(self, network: Network, trajectories: Trajectories) -> Budget:
        """Return the budget; raises AerogelError when none is given, two are, or it cannot be met."""
        return budget_of(network, trajectories, self.ratio, self.target_speedup, self.by)
