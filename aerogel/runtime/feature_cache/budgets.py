"""Budget of a cache, in cache entries, multiply-accumulates or measured seconds; a mask that meets it is exact, not about right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of, costs_of, seconds_of

Measure = Literal["latency", "macs"]


@dataclass(frozen=True)
class Budget:
    """Least saving of a mask (T, N; True where a module runs)."""

    cost_N: tuple[float, ...]
    """Cost of running each module once."""
    saving: float
    """Least cost of all modules that do not run, together."""
    max_age: int = 0
    """Steps in a row at which a module may be reused, at most; 0 is without bound."""

    def saved(self, mask_TN: Tensor) -> float:
        """Return the saving of a mask."""
        return float(((~mask_TN).double() * torch.tensor(self.cost_N, dtype=torch.float64)).sum())

    def is_met(self, mask_TN: Tensor) -> bool:
        """Return True where it is enough, but for rounding."""
        return self.saved(mask_TN) >= self.saving * (1 - 1e-9)

    def with_max_reuse(self, max_age: int, steps: int) -> Budget:
        """The same with a bound on the steps in a row; raises AerogelError where so many steps cannot save enough then."""
        made, modules = replace(self, max_age=max_age), len(self.cost_N)
        if made.reachable(torch.ones(steps, modules, dtype=torch.bool)):
            return made
        most = _most([False] * steps, [step > 0 for step in range(steps)], max_age) or 0
        raise AerogelError(
            f"the budget means to save {self.saving:.3g}; with max_age {max_age} each of {modules} modules is cached at {most} of {steps} "
            f"steps at most, which saves {most * sum(self.cost_N):.3g}: ask for less, or set max_age higher (0 is without bound)"
        )

    def allowed(self, mask_TN: Tensor) -> bool:
        """Return True where no module is reused at more steps in a row than it may be."""
        return not self.max_age or None not in self._most(mask_TN, torch.zeros_like(mask_TN))

    def enforce(self, mask_TN: Tensor) -> Tensor:
        """The mask with as few more modules running as the bound on steps in a row asks for."""
        made_TN, age_N = mask_TN.clone(), torch.zeros(mask_TN.shape[1], dtype=torch.long)
        for row_N in made_TN:
            if self.max_age:
                row_N |= age_N >= self.max_age
            age_N = torch.where(row_N, 0, age_N + 1)
        return made_TN

    def reachable(self, mask_TN: Tensor, open_TN: Tensor | None = None) -> bool:
        """Return True where a mask is allowed and can be made to meet it by reusing more: of what is open, or of all behind the first step.

        Without a bound on the steps in a row each is.
        """
        if not self.max_age:
            return True
        if open_TN is None:
            open_TN = torch.ones_like(mask_TN)
            open_TN[0] = False
        most_N = self._most(mask_TN, open_TN)
        if None in most_N:
            return False
        return sum(cost * (most or 0) for cost, most in zip(self.cost_N, most_N, strict=True)) >= self.saving * (1 - 1e-9)

    def _most(self, mask_TN: Tensor, open_TN: Tensor) -> list[int | None]:
        columns = zip((~mask_TN).T.tolist(), open_TN.T.tolist(), strict=True)
        return [_most(reused_T, open_T, self.max_age) for reused_T, open_T in columns]

    def decoded(self, order: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Tensor:
        """Reuse entries (step, module) in this order until it is met, then run again those that it does not need, the last first.

        With a bound on the steps in a row, those are left out with which it could not be met any more.
        """
        mask_TN, open_TN = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for entry in order:
            open_TN[entry] = True
        taken = []
        for entry in order:
            if self.is_met(mask_TN):
                break
            mask_TN[entry] = False
            if self.reachable(mask_TN, open_TN):
                taken.append(entry)
            else:
                mask_TN[entry] = True
        for entry in reversed(taken):
            mask_TN[entry] = True
            if not self.is_met(mask_TN):
                mask_TN[entry] = False
        return mask_TN


def _most(reused_T: Sequence[bool], open_T: Sequence[bool], max_age: int) -> int | None:
    """At how many steps a module is reused at most, of those at which it is and those that are open; None where it is at too many in a row.

    Where too many come in a row it runs at the last of them that is free, so that the next ones begin as late as they can.
    """
    count, ran, free = 0, -1, -1
    for step, (reused, is_open) in enumerate(zip(reused_T, open_T, strict=True)):
        if not reused and not is_open:
            ran = step
            continue
        count += 1
        free = free if reused else step
        if step - ran > max_age:
            if free <= ran:
                return None
            ran, count = free, count - 1
    return count


def budget_of(network: Network, trajectories: Trajectories, ratio: float | None, speedup: float | None, by: Measure) -> Budget:
    """The budget for a share of cache entries or a target speed-up of the denoiser.

    Raises AerogelError unless one of the two is given, and when reusing everything after the first step would not be enough.
    """
    require_one(ratio, speedup)
    steps, modules = len(trajectories.steps), len(cached_modules_of(network))
    if ratio is not None:
        return budget_of_ratio(ratio, steps, modules)
    assert speedup is not None, "one of the two"
    whole, cost_N = _costs(network, trajectories.first, by)
    return _possible(Budget(cost_N, steps * whole * (1 - 1 / speedup)), f"a speed-up of {speedup} by {by}", steps)


def require_one(ratio: float | None, speedup: float | None) -> None:
    """Raise AerogelError unless one of the two is given."""
    if (ratio is None) == (speedup is None):
        raise AerogelError("give one of ratio (share of steps x modules to cache) and target_speedup (times faster)")


def budget_of_ratio(ratio: float, steps: int, modules: int) -> Budget:
    """The budget for a share of cache entries, which all cost the same; raises AerogelError where the steps after the first are too few."""
    return _possible(Budget((1.0,) * modules, float(round(ratio * steps * modules))), f"a ratio of {ratio}", steps)


def _possible(made: Budget, what: str, steps: int) -> Budget:
    most = (steps - 1) * sum(made.cost_N)
    if made.saving < 0 or made.saving > most:
        raise AerogelError(
            f"{what} cannot be had: it saves {made.saving:.3g}; caching all {len(made.cost_N)} modules at all but the first of {steps} "
            f"steps saves {most:.3g}"
        )
    return made


def budget_like(network: Network, call: Call, mask_TN: Tensor, by: Measure) -> Budget:
    """The budget that a mask meets by what it saves."""
    _, cost_N = _costs(network, call, by)
    made = Budget(cost_N, 0.0)
    return replace(made, saving=made.saved(mask_TN))


def _costs(network: Network, call: Call, by: Measure) -> tuple[float, tuple[float, ...]]:
    if by == "latency":
        return seconds_of(network, call)
    costs = costs_of(network, call)
    return costs.macs, costs.module_macs
