"""What feature-caching policies share: the schedule they act by, the dtype of what they cache, budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call, tensors_in
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Share
from aerogel.runtime.feature_cache.block_cache import Rule, caching_blocks
from aerogel.runtime.feature_cache.budgets import Budget, Measure, budget_of, budget_of_ratio, require_one
from aerogel.runtime.feature_cache.cache_dtype import CacheDtype, cache_format
from aerogel.runtime.feature_cache.cached_modules import Costs, cached_modules_of, costs_of
from aerogel.runtime.feature_cache.schedule import Schedule, cache_bytes, caching

SearchSpace = tuple[str, tuple[float, ...]]
"""A option, and values of it in order of what they save, the least first."""


@dataclass(frozen=True)
class FeatureCachePolicy(RuntimePolicy[dict[str, Any]]):
    """Lets modules of a denoiser return their cached outputs of earlier steps, by a schedule that is its state."""

    skips_modules: ClassVar[bool] = True
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "trajectories", "cached_modules", "uncached"})

    search_space: ClassVar[SearchSpace | None] = None
    """What sets how much is reused, for who looks for a speed; None where nothing does."""
    rounds: ClassVar[bool] = True
    """Whether what it keeps may be rounded to float8; not where a policy puts itself on in its own way, unless that says so."""

    cache_dtype: CacheDtype = field(default="compute", kw_only=True)
    """How kept tensors are stored: in the dtype they are computed in, or as float8 (e4m3) with one scale a token."""

    @property
    def plain(self) -> bool:
        """Whether it gives outputs again by its schedule and does nothing else: it puts itself on as this class does."""
        return type(self).on is FeatureCachePolicy.on

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

    def calibrated(self, network: Network, calls: Sequence[Call], before: dict[str, Any] | None = None) -> dict[str, Any]:
        """Calibrate; where it acts by its schedule alone, the state says what that saves of one sample: two forwards with guidance.

        `macs` are the multiply-accumulates of a forward, `macs_saved` the share of a whole run's that is skipped, `slot_bytes` the most
        that is held between two steps.
        """
        # Before the schedule is made, which may take hours: what cannot be counted fails now.
        costs = costs_of(network, calls[0]) if self.plain and calls else None
        state = self._made(network, calls, before)
        if costs is None:
            return state
        return state | _saving(Schedule.of(network, state), costs, len(tensors_in((calls[0].args, calls[0].kwargs))[0]))

    def _made(self, network: Network, calls: Sequence[Call], before: dict[str, Any] | None) -> dict[str, Any]:
        return self.calibrate(network, calls)

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Reuse by the schedule; raises AerogelError when it is of other modules, and at steps that are not its own."""
        return caching(network, Schedule.of(network, state), store=self.cache_dtype)


class ScheduleRefiner(FeatureCachePolicy):
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

    def _made(self, network: Network, calls: Sequence[Call], before: dict[str, Any] | None) -> dict[str, Any]:
        return self.calibrate(network, calls) if before is None else self.revise(network, calls, before)

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Refuse: by itself it has nothing to go on from."""
        raise AerogelError(f"{name_of(self)} goes on from a schedule: put a policy that reuses by one before it")

    @abstractmethod
    def revise(self, network: Network, calls: Sequence[Call], before: dict[str, Any]) -> dict[str, Any]:
        """Return the state that takes the place of the one before; that policy is off meanwhile."""


def _saving(schedule: Schedule, costs: Costs, samples: int) -> dict[str, Any]:
    reused_TN = ~schedule.computed_TN[1:]  # nothing is kept before the first step
    saved = float((reused_TN.double() @ torch.tensor(costs.module_macs, dtype=torch.float64)).sum())
    return {
        "macs": costs.macs / samples,
        "macs_saved": saved / (len(schedule.steps) * costs.macs),
        "slot_bytes": cache_bytes(schedule, costs.module_bytes) // samples,
    }


class BlockCachePolicy(FeatureCachePolicy):
    """Leaves out block ranges of a denoiser by a rule, and adds what they added before."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "trajectories", "block_range", "uncached"})
    rounds: ClassVar[bool] = True

    @abstractmethod
    def rule(self, state: dict[str, Any]) -> Rule:
        """A new rule, for one guidance stream of one run."""

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Leave out blocks by the rule; raises AerogelError when the state is of another network, and at steps that are not its own."""
        return caching_blocks(network, state, partial(self.rule, state), self.cache_dtype)


@dataclass(frozen=True)
class BudgetedCachePolicy(FeatureCachePolicy):
    """Reuses until an exact budget is met, so that the network stays close to what it was before any step of the recipe."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "teacher", "trajectories", "cached_modules", "replays", "uncached"})

    ratio: Share | None = None
    """Share of the schedule's entries (steps x modules) that return cached outputs; this or `target_speedup`."""
    target_speedup: Annotated[float, Field(ge=1)] | None = None
    """How many times faster the denoiser has to be."""
    by: Measure = "latency"
    """What a target speed-up is counted in: measured seconds of the modules, or their multiply-accumulates."""

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
        """What has to be saved; raises AerogelError when that is not said, said twice or cannot be had."""
        return budget_of(network, trajectories, self.ratio, self.target_speedup, self.by)
