"""TaylorSeer: modules that do not run are extrapolated from the last steps at which they did (arXiv:2503.06923)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.methods.feature_cache.policy import SchedulePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState, caching, schedule_state
from aerogel.runtime.feature_cache.taylor import TaylorSeries


@dataclass(frozen=True)
class Taylorseer(SchedulePolicy[ScheduleState]):
    """Runs all modules every `interval` steps, and extrapolates their outputs in between with a Taylor series of finite differences."""

    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    interval: Count = 4
    """Steps from one that computes to the next."""
    order: CountOrZero = 4
    """Highest derivative."""
    warmup: Count = 2
    """Steps at the start that all compute."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> ScheduleState:
        """Read the sampler's steps off the calls; raises AerogelError for options below their least values."""
        return schedule_state(network, Trajectories.of(network, calls), self._computed)

    def on(self, network: Network, state: ScheduleState) -> AbstractContextManager[Any]:
        """Predict by the table."""
        return caching(network, Schedule.of(network, state), partial(TaylorSeries, order=self.order))

    def _computed(self, steps: int, modules: int) -> Tensor:
        steps_T = torch.arange(steps)
        since_T = steps_T - (self.warmup - 1)
        return ((since_T <= 0) | since_T.remainder(self.interval).eq(0))[:, None].expand(-1, modules)
