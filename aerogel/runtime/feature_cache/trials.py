"""Effect of masks on the final image itself: every trial is a real generation, forked where it differs.

T steps, N modules. A mask (T, N) is True where a module runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aerogel.model.network import Network
from aerogel.model.trajectories import Trajectories
from aerogel.runtime.feature_cache.controlled import CacheContents, ControlledDenoiser, controlled
from aerogel.runtime.feature_cache.replay import Replay, State, output_of, replays
from aerogel.runtime.feature_cache.schedule import Schedule, ScheduleState
from aerogel.training.distributed import averaged

KEPT_VALUES = 2**16
"""Most numbers that are kept of what images are off by."""


class Trials:
    """Generations of the same noise under different masks, against those that are wanted of the network.

    Where they are `shared`, each process of a group makes its share of the images, and errors are those of all.
    """

    def __init__(self, controlled: ControlledDenoiser, replays: Sequence[Replay], states: Sequence[State], *, shared: bool = False) -> None:
        self.controlled, self._replays, self._shares = controlled, replays, shared
        self._starts = [[(state, controlled.empty)] for state in states]
        self.count = 0
        """Masks that were tried."""
        self.exact = [
            replay.finish(state, lambda _, call: output_of(controlled.wanted(call))) for replay, state in zip(replays, states, strict=True)
        ]
        self._mask: Tensor | None = None
        self._along: list[list[tuple[State, CacheContents]]] = self._starts

    @torch.no_grad()
    def images(self, mask_TN: Tensor) -> list[Tensor]:
        """The final images under a mask."""
        self.count += 1
        shared = self._shared(mask_TN)
        return [self._finish(replay, *along[shared], mask_TN) for replay, along in zip(self._replays, self._along, strict=True)]

    def error(self, mask_TN: Tensor) -> float:
        """The mean squared error of the final images under a mask."""
        return self._error(self.images(mask_TN))

    def apart(self, mask_TN: Tensor | None = None) -> Tensor:
        """Return the error of the final images under a mask, or the settled one, in one vector, hashed to fewer numbers if it is long."""
        images = [along[-1][0].x_BCHW for along in self._along] if mask_TN is None else self.images(mask_TN)
        apart = torch.cat([(a - b).flatten().float() for a, b in zip(images, self.exact, strict=True)])
        if len(apart) <= KEPT_VALUES:
            return apart
        places, signs = self._hash
        return torch.zeros(KEPT_VALUES, device=apart.device).index_add_(0, places, signs * apart)

    @cached_property
    def _hash(self) -> tuple[Tensor, Tensor]:
        """A place and a sign for each number of the images: the same for all vectors, so that inner products stay, nearly."""
        count, generator = sum(image.numel() for image in self.exact), torch.Generator().manual_seed(0)
        places, signs = torch.randint(KEPT_VALUES, (count,), generator=generator), torch.randint(2, (count,), generator=generator) * 2.0 - 1
        return places.to(self.exact[0].device), signs.to(self.exact[0].device)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """The inner products of such vectors, as shares of the mean squared error; of all processes where they are shared."""
        vectors_VX = torch.stack(list(vectors))
        made_VV = (vectors_VX @ vectors_VX.T).double().cpu() / sum(image.numel() for image in self.exact)
        return averaged(made_VV) if self._shares else made_VV

    @torch.no_grad()
    def settle(self, mask_TN: Tensor) -> float:
        """Make a mask the one that others are forked from, and return its error."""
        along = []
        for replay, start in zip(self._replays, self._starts, strict=True):
            states, (state, held) = [], start[0]
            state = state.fork()
            for row in mask_TN.tolist():
                states.append((state.fork(), held))
                made, held = self.controlled.step(replay.call(state), row, held)
                state = replay.advance(state, output_of(made))
            along.append([*states, (state, held)])
        self._mask, self._along = mask_TN.clone(), along
        return self._error([states[-1][0].x_BCHW for states in along])

    def _error(self, images: Sequence[Tensor]) -> float:
        error = mean_square(images, self.exact)
        return float(averaged(torch.tensor(error, dtype=torch.float64))) if self._shares else error

    def _shared(self, mask_TN: Tensor) -> int:
        """The steps that a mask shares with the settled one, from the start."""
        if self._mask is None:
            return 0
        differs_T = (mask_TN != self._mask).any(-1)
        return int(differs_T.int().argmax()) if bool(differs_T.any()) else len(mask_TN)

    def _finish(self, replay: Replay, state: State, held: CacheContents, mask_TN: Tensor) -> Tensor:
        state = state.fork()
        for row in mask_TN[state.step :].tolist():
            made, held = self.controlled.step(replay.call(state), row, held)
            state = replay.advance(state, output_of(made))
        return state.x_BCHW


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchedState(ScheduleState):
    """A schedule that was found by trials; errors are mean squared errors of final latents."""

    error: float
    """Error from noise that the search did not see."""
    error_without_reuse: float
    """Error from that noise where all modules run."""
    error_of_trials: float
    """Error from the noise that was searched on."""
    trials: int
    """Schedules that were tried."""
    guidance: float
    """Guidance of the recorded generations, as Replay has it."""


@dataclass(frozen=True)
class Generations:
    """Recorded generations to try masks on, and as many of other noise to judge what was found."""

    runs: Sequence[Replay]
    trials: Trials
    unseen: Trials
    generator: torch.Generator

    def others(self, times: int) -> Trials:
        """So many times as many, of other noise again."""
        runs = [*self.runs] * times
        return Trials(self.trials.controlled, runs, [run.noise(self.generator) for run in runs])

    def state(self, schedule: Schedule) -> SearchedState:
        """Return the state of a schedule that was found."""
        seen, count = self.trials.settle(schedule.computed_TN), self.trials.count
        return SearchedState(
            **vars(schedule.as_state()),
            error=self.unseen.error(schedule.computed_TN),
            error_without_reuse=self.unseen.error(torch.ones_like(schedule.computed_TN)),
            error_of_trials=seen,
            trials=count,
            guidance=self.runs[0].guidance,
        )


@contextmanager
def generating(network: Network, trajectories: Trajectories, samples: int) -> Iterator[Generations]:
    """Take over a denoiser to try masks on the first of its recorded generations, about as many images as `samples` says.

    Raises AerogelError when the calls do not replay.
    """
    recorded = replays(network, trajectories)
    runs = recorded[: max(1, math.ceil(samples / len(recorded[0].start().x_BCHW)))]
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    with controlled(network) as denoiser, torch.no_grad():
        trials = Trials(denoiser, runs, [run.start() for run in runs])
        unseen = Trials(denoiser, runs, [run.noise(generator) for run in runs])
        yield Generations(runs, trials, unseen, generator)


def mean_square(images: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The mean squared error over all images."""
    return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(images, exact, strict=True)) / sum(x.numel() for x in exact)
