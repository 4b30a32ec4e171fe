"""Evenly spaced whole steps that reuse, at any cache ratio: FORA (arXiv:2407.01425) between its intervals, a base line for all others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.method import RuntimePolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.reuse import Schedule, reusing, scheduled


@dataclass(frozen=True)
class Evenly(RuntimePolicy):
    """Reuses all outputs at some steps, which are spread as evenly as they can be."""

    ratio: float = 0.5
    """Share of the steps that reuse; the first never does."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Read the sampler's steps off the calls; raises AerogelError for a ratio that is not from 0 to below 1."""
        if not 0 <= self.ratio < 1:
            raise AerogelError(f"ratio is {self.ratio}; it is from 0 to below 1")
        return scheduled(network, calls, lambda steps, units: spread(steps, self.ratio)[:, None].expand(-1, units))

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Reuse by the table."""
        return reusing(network, Schedule.of(network, state))


def spread(steps: int, ratio: float) -> Tensor:
    """Return which of T steps compute: the first, and from there as evenly as it goes."""
    computing = max(1, steps - round(ratio * steps))
    computes_T = torch.zeros(steps, dtype=torch.bool)
    computes_T[[number * steps // computing for number in range(computing)]] = True
    return computes_T
