"""Evenly spaced whole steps that reuse, at any cache ratio: FORA (arXiv:2407.01425) between its intervals, a base line for all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before
from aerogel.methods.feature_cache.policy import SchedulePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, Share
from aerogel.runtime.feature_cache.schedule import ScheduleState, schedule_state


@dataclass(frozen=True)
class UniformCache(SchedulePolicy[ScheduleState]):
    """Returns all cached outputs at evenly spaced steps, from the first allowed step to the last."""

    search_space: ClassVar[SearchSpace | None] = ("ratio", tuple(step / 20 for step in range(2, 20)))

    ratio: Share = 0.5
    """Share of the steps that reuse."""
    first: Count = 1
    """The first step that may reuse, counted from 0; FORA's is 1, from 3 on the final image suffers far less."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> ScheduleState:
        """Read the sampler's steps off the calls; raises AerogelError when so many steps cannot reuse."""
        return schedule_state(
            network,
            Trajectories.of(network, calls),
            lambda steps, modules: spread(steps, self.ratio, self.first)[:, None].expand(-1, modules),
        )

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Count the steps that can reuse."""
        if before.size.steps > 1:
            yield from reasons(lambda: spread(before.size.steps, self.ratio, self.first))


def spread(steps: int, ratio: float, first: int) -> Tensor:
    """Return which of T steps compute; the others lie evenly from `first` to the last."""
    count, room = round(ratio * steps), steps - first
    if count > room:
        raise AerogelError(f"a ratio of {ratio} means that {count} of {steps} steps reuse; from step {first} on there are {max(room, 0)}")
    computes_T = torch.ones(steps, dtype=torch.bool)
    computes_T[torch.linspace(first, steps - 1, count).round().long()] = False
    return computes_T
