"""DeepCache: the inner blocks of a UNet run at some steps only, the outer ones at all (arXiv:2312.00858)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy
from pydantic import Field

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before, Requirement
from aerogel.methods.feature_cache.policy import FeatureCachePolicy, SearchSpace
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, CountOrZero
from aerogel.runtime.feature_cache.skip_connections import SkipState, caching_inner_blocks, skip_state, skips_of
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True)
class Deepcache(FeatureCachePolicy[SkipState]):
    """Runs all blocks of a UNet every `interval` steps, and only the blocks outside a skip connection in between."""

    state: ClassVar[type[PolicyState]] = SkipState
    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "trajectories", "skips", "uncached"})
    search_space: ClassVar[SearchSpace | None] = ("interval", (2, 3, 4, 5, 6, 8, 10))

    interval: Count = 3
    """Steps from one at which all blocks run to the next, from the first on (as in the authors' README)."""
    branch: CountOrZero = 0
    """The skip connection inside of which blocks are skipped, counted from 0, the outermost (as in the authors' README)."""
    center: CountOrZero | None = None
    """The step, counted from 0, near which they lie denser, as many in all; None spaces them evenly (the authors' default)."""
    power: Annotated[float, Field(gt=1)] = 1.4
    """With a center, how fast they thin out away from it; lowered by 0.02 until no two fall together (the authors' example)."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> SkipState:
        """Find the blocks and the sampler's steps; raises AerogelError for options out of range, and for denoisers without such skips."""
        skips_of(network)
        trajectories = Trajectories.of(network, calls)
        steps = len(trajectories.steps)
        whole = self._whole(steps)
        return skip_state(network, trajectories, self.branch, "".join("1" if step in whole else "0" for step in range(steps)))

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Lay the steps at which all blocks run around the center."""
        if before.size.steps > 1:
            yield from reasons(lambda: self._whole(before.size.steps))

    def _whole(self, steps: int) -> Sequence[int]:
        """The steps at which all blocks run."""
        whole = range(0, steps, self.interval)
        return whole if self.center is None else gathered(steps, len(whole), self.center, self.power)

    def on(self, network: Network, state: SkipState) -> AbstractContextManager[Any]:
        """Skip blocks; raises AerogelError when the state is of other blocks, and at steps that are not its own."""
        return caching_inner_blocks(network, state)


def gathered(steps: int, count: int, center: int, power: float) -> list[int]:
    """Return so many of the steps, the first among them, that lie the closer together the nearer they are to the center.

    With T steps, center c and power p the authors' code takes l_i evenly from (-c)^(1/p) to (T - c)^(1/p) and steps Re(l_i^p) + c, made
    whole towards the center; roots of negative numbers are complex. Raises AerogelError where no power above 1 keeps the steps apart.
    """
    if center >= steps:
        raise AerogelError(f"center {center} is none of the {steps} steps, which are counted from 0")
    lowered = power
    while lowered > 1:
        ends = ((-center) ** (1 / lowered), (steps - center) ** (1 / lowered))
        found = numpy.unique((numpy.linspace(*ends, count + 1) ** lowered).real.astype(int)).tolist()
        if len(found) == count + 1:
            return [0, *(step + center for step in found[1:-1])]
        lowered -= 0.02
    raise AerogelError(
        f"no power from {power} down to 1 keeps {count} of {steps} steps apart around center {center}; "
        "take a larger interval, another center or none"
    )
