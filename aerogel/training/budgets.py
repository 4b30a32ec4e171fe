"""What a cache has to save, in slots, multiply-accumulates or measured seconds; a mask that saves it is exact, not about right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.streams import steps_in
from aerogel.model.units import costs_of, seconds_of, units_of

Measure = Literal["latency", "macs"]


@dataclass(frozen=True)
class Budget:
    """What a mask (T, N; True where a unit runs) has to save."""

    cost_N: tuple[float, ...]
    """Cost of running each unit once."""
    saving: float
    """What all units that do not run must cost together, at least."""

    def saved(self, mask_TN: Tensor) -> float:
        """What a mask saves."""
        return float(((~mask_TN).double() * torch.tensor(self.cost_N, dtype=torch.float64)).sum())

    def met(self, mask_TN: Tensor) -> bool:
        """Whether it is enough, but for rounding."""
        return self.saved(mask_TN) >= self.saving * (1 - 1e-9)

    def decoded(self, order: Sequence[tuple[int, int]], shape: tuple[int, int]) -> Tensor:
        """Reuse slots (step, unit) in this order until it is met, then run again those that it does not need, the last first."""
        mask_TN = torch.ones(shape, dtype=torch.bool)
        taken = []
        for step, unit in order:
            if self.met(mask_TN):
                break
            mask_TN[step, unit] = False
            taken.append((step, unit))
        for step, unit in reversed(taken):
            mask_TN[step, unit] = True
            if not self.met(mask_TN):
                mask_TN[step, unit] = False
        return mask_TN


def budget_of(network: Network, calls: Sequence[Call], ratio: float | None, speedup: float | None, by: Measure) -> Budget:
    """The budget for a share of slots or a target speed-up of the denoiser.

    Raises AerogelError unless one of the two is given, and when reusing everything after the first step would not be enough.
    """
    if (ratio is None) == (speedup is None):
        raise AerogelError("give one of ratio (share of slots to reuse) and target_speedup (times faster)")
    steps, units = len(steps_in(network, calls)), len(units_of(network))
    most = steps - 1
    if ratio is not None:
        made = Budget((1.0,) * units, float(round(ratio * steps * units)))
        what = f"a ratio of {ratio}"
    else:
        assert speedup is not None, "one of the two"
        whole, cost_N = _costs(network, calls[0], by)
        made = Budget(cost_N, steps * whole * (1 - 1 / speedup))
        what = f"a speed-up of {speedup} by {by}"
    if (speedup is not None and speedup < 1) or made.saving < 0 or made.saving > most * sum(made.cost_N):
        raise AerogelError(
            f"{what} cannot be had: it means to save {made.saving:.3g}; reusing all {units} units at all but the first of {steps} steps "
            f"saves {most * sum(made.cost_N):.3g}"
        )
    return made


def _costs(network: Network, call: Call, by: Measure) -> tuple[float, tuple[float, ...]]:
    if by == "latency":
        return seconds_of(network, call)
    costs = costs_of(network, call)
    return costs.macs, costs.unit_macs
