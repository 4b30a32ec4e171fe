"""FORA: every module runs at every Nth step and returns its cached output at the others (arXiv:2407.01425)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from aerogel.methods.feature_cache.policy import SchedulePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count
from aerogel.runtime.feature_cache.schedule import ScheduleState, schedule_state


@dataclass(frozen=True)
class Fora(SchedulePolicy[ScheduleState]):
    """Runs all attention and FFN modules of a denoiser every `interval` steps, and returns their cached outputs in between."""

    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    interval: Count = 2
    """Steps from one that computes to the next; the first computes."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> ScheduleState:
        """Read the sampler's steps off the calls; raises AerogelError for an interval below 1."""
        return schedule_state(
            network,
            Trajectories.of(network, calls),
            lambda steps, modules: torch.arange(steps).remainder(self.interval).eq(0)[:, None].expand(-1, modules),
        )
