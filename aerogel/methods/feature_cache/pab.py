"""PAB: in the middle of the sampler attention is run now and then only, and broadcast to the steps between (arXiv:2408.12588)."""

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
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.schedule import ScheduleState, schedule_state


@dataclass(frozen=True)
class Pab(SchedulePolicy[ScheduleState]):
    """Broadcasts attention outputs to the next steps while the time step is within a window; FFNs always run."""

    search_space: ClassVar[SearchSpace | None] = ("self_every", (2, 3, 4, 6, 8, 10))

    self_every: Count = 2
    """Within the window self-attention runs every so many steps."""
    cross_every: Count = 6
    """And cross-attention."""
    first: float = 100.0
    """Time steps above it are within the window."""
    last: float = 800.0
    """And below this one."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> ScheduleState:
        """Read the sampler's steps off the calls; raises AerogelError for intervals below 1."""
        every = {"self-attention": self.self_every, "cross-attention": self.cross_every}
        kinds = [every.get(module.kind, 1) for module in cached_modules_of(network).values()]
        trajectories = Trajectories.of(network, calls)
        columns = {interval: broadcast(trajectories.thousandths, interval, self.first, self.last) for interval in set(kinds)}
        return schedule_state(network, trajectories, lambda *_: torch.tensor([columns[interval] for interval in kinds]).T)


def broadcast(steps: Sequence[float], every: int, first: float, last: float) -> list[bool]:
    """Return at which steps a module runs: outside of the window always, inside when its last run was `every` steps ago."""
    runs, since = [], 0
    for place, step in enumerate(steps):
        inside = place > 0 and first < step < last and since + 1 < every
        since = since + 1 if inside else 0
        runs.append(not inside)
    return runs
