"""TaylorSeer: modules that do not run are extrapolated from the last steps at which they did (arXiv:2503.06923)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aerogel.methods.feature_cache.policy import FeatureCachePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero
from aerogel.runtime.feature_cache.schedule import CacheEntry, Schedule, caching, schedule_state


@dataclass(frozen=True)
class Taylorseer(FeatureCachePolicy):
    """Runs all modules every `interval` steps, and extrapolates their outputs in between with a Taylor series of finite differences."""

    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    interval: Count = 4
    """Steps from one that computes to the next."""
    order: CountOrZero = 4
    """Highest derivative."""
    warmup: Count = 2
    """Steps at the start that all compute."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Read the sampler's steps off the calls; raises AerogelError for options below their least values."""
        return schedule_state(network, Trajectories.of(network, calls), self._computed)

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Predict by the table."""
        return caching(network, Schedule.of(network, state), partial(_Series, order=self.order))

    def _computed(self, steps: int, modules: int) -> Tensor:
        steps_T = torch.arange(steps)
        since_T = steps_T - (self.warmup - 1)
        return ((since_T <= 0) | since_T.remainder(self.interval).eq(0))[:, None].expand(-1, modules)


class _Kept(NamedTuple):
    """A module's outputs and their finite differences, the newest."""

    row: int
    differences: tuple[Any, ...]


class _Series(CacheEntry):
    remembers: ClassVar[bool] = True

    def __init__(self, own: Callable[..., Any], order: int) -> None:
        super().__init__(own)
        self._order = order

    def keep(self, made: Any) -> _Kept:
        """The output, and what it and the last ones say of the derivatives."""
        before: _Kept | None = self.value
        found = [made]
        if before is not None:
            apart = self.row - before.row
            for old in before.differences[: self._order]:
                found.append(pytree.tree_map(lambda a, b: (a - b) / apart, found[-1], old))
        return _Kept(self.row, tuple(found))

    def give(self) -> tuple[Any, Any]:
        """The series so many steps behind the last output."""
        kept: _Kept = self.value
        ahead = self.row - kept.row
        given = kept.differences[0]
        for order, difference in enumerate(kept.differences[1:], 1):
            weight = ahead**order / math.factorial(order)
            given = pytree.tree_map(lambda a, b, weight=weight: a + weight * b, given, difference)
        return given, kept
