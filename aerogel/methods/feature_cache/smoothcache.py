"""SmoothCache: modules of a kind are reused as long as a calibration says that they change little (arXiv:2411.10510)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aerogel.methods.feature_cache.policy import SchedulePolicy, SearchSpace
from aerogel.model.calls import Call, tensors_in
from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.options import Count, NonNegative
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.runtime.feature_cache.schedule import ScheduleState, schedule_state
from aerogel.runtime.policy_state import PolicyState, by_name


@dataclass(frozen=True, eq=False, kw_only=True)
class SmoothcacheState(ScheduleState):
    """A schedule, and the changes that it was made by."""

    changes: Mapping[str, Tensor] = by_name()
    """By kind of module, `kind.change` (T, A): the relative L1 distance of its outputs at a step to those 1 to A steps before."""


@dataclass(frozen=True)
class Smoothcache(SchedulePolicy[SmoothcacheState]):
    """Returns the cached outputs of all modules of a kind while these have changed by at most `alpha`."""

    state: ClassVar[type[PolicyState]] = SmoothcacheState
    search_space: ClassVar[SearchSpace | None] = ("alpha", (0.02, 0.04, 0.06, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0))

    alpha: NonNegative = 0.08
    """Largest relative L1 distance, averaged over the modules of a kind; the authors use 0.08 to 0.35."""
    longest: Count = 3
    """Most steps in a row that reuse."""

    @torch.no_grad()
    def calibrate(self, network: Network, calls: Sequence[Call]) -> SmoothcacheState:
        """Measure the change from step to step on the recorded calls; raises AerogelError for options out of range."""
        trajectories = Trajectories.of(network, calls)
        kinds = [module.kind for module in cached_modules_of(network).values()]
        changes_NTA = self._changes(network, trajectories)
        changes = {kind: changes_NTA[[place for place, other in enumerate(kinds) if other == kind]].mean(0) for kind in set(kinds)}
        columns = {kind: smooth(change_TA, self.alpha) for kind, change_TA in changes.items()}
        state = schedule_state(network, trajectories, lambda *_: torch.tensor([columns[kind] for kind in kinds]).T)
        return SmoothcacheState(**vars(state), changes={f"{kind}.change": change_TA for kind, change_TA in changes.items()})

    def _changes(self, network: Network, trajectories: Trajectories) -> Tensor:
        """Relative L1 distance (N, T, A) of each module's output at a step to that 1 to A steps before, over all generations."""
        names = list(cached_modules_of(network))
        total_NTA = torch.zeros(len(names), len(trajectories.steps), self.longest)
        recent: list[list[Tensor]] = []
        for step, call in ((step, call) for run in trajectories.runs for step, call in enumerate(run.calls)):
            recent = [] if step == 0 else recent
            given = _outputs(network, names, call)
            for ago, before in enumerate(reversed(recent[-self.longest :])):
                for place, (new, old) in enumerate(zip(given, before, strict=True)):
                    total_NTA[place, step, ago] += (new - old).abs().sum() / old.abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
            recent = [*recent[1 - self.longest :], given] if self.longest > 1 else [given]
        return total_NTA / len(trajectories.runs)


def _outputs(network: Network, names: Sequence[str], call: Call) -> list[Tensor]:
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            made[name] = torch.cat([tensor.float().flatten() for tensor in tensors_in(output)])

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(network.module.get_submodule(name).register_forward_hook(keep(name)).remove)
        network.run(call)
    return [made[name] for name in names]


def smooth(change_TA: Tensor, alpha: float) -> list[bool]:
    """Return at which of T steps a kind runs: from each run the longest run of reuse whose every step changed by at most alpha."""
    steps, longest = change_TA.shape
    runs, last = [True], 0
    for step in range(1, steps):
        ago = step - last
        reuses = step < steps - 1 and ago <= longest and float(change_TA[step, ago - 1]) <= alpha
        runs.append(not reuses)
        last = last if reuses else step
    return runs
