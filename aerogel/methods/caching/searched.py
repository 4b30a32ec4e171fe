"""A schedule found by trial: real generations say which reuse the final image minds least. Ours; exhaustive searches of this kind are slow.

T steps, N units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aerogel.data.replay import replays
from aerogel.methods.method import BudgetPolicy
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.reuse.driven import driven
from aerogel.model.reuse.schedule import Schedule
from aerogel.model.reuse.streams import sampler_of
from aerogel.model.reuse.units import units_of
from aerogel.training.masks import Search, Trials


@dataclass(frozen=True)
class Searched(BudgetPolicy):
    """Reuses what was found to move the final images least: whole steps first, then single units, then exchanges."""

    trials: int = 2000
    """Generations it may take, forked where they differ."""
    samples: int = 32
    """Pictures that are made in each, of those that were recorded."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Search on the recorded generations; raises AerogelError when they do not replay or the budget cannot be met."""
        budget = self.budget(network, calls)
        recorded, units = replays(network, calls), tuple(units_of(network))
        runs = recorded[: max(1, math.ceil(self.samples / len(recorded[0].start().x_BCHW)))]
        shape = (len(runs[0].calls), len(units))
        with driven(network) as denoiser, torch.no_grad():
            trials = Trials(denoiser, runs, [run.start() for run in runs])
            search = Search(trials, budget, self.trials)
            mask_TN = search.swaps(search.single_units(search.whole_steps(shape)))
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
            unseen = Trials(denoiser, runs, [run.noise(generator) for run in runs])
            seen, error, without = trials.settle(mask_TN), unseen.error(mask_TN), unseen.error(torch.ones_like(mask_TN))
        state = Schedule(runs[0].steps, sampler_of(network), units, mask_TN).as_state()
        return state | {
            "error": error, "error_without_reuse": without, "error_of_trials": seen, "trials": trials.count, "guidance": runs[0].guidance
        }  # fmt: skip
