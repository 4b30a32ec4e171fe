"""Which units of which steps to reuse, by the error of the final image itself: every trial is a real generation, forked where it differs.

T steps, N units. A mask (T, N) is True where a unit runs. What a mask saves is counted in any unit of cost: slots, MACs or seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aerogel.data.replay import Replay, State, output_of
from aerogel.model.reuse.driven import Driven, Held
from aerogel.training.budgets import Budget
from aerogel.training.processes import averaged


class Trials:
    """Generations of the same noise under different masks, against those that are wanted of the network.

    Where they are `shared`, each process of a group makes its share of the pictures, and errors are those of all.
    """

    def __init__(self, driven: Driven, replays: Sequence[Replay], states: Sequence[State], *, shared: bool = False) -> None:
        self.driven, self._replays, self._shares = driven, replays, shared
        self._starts = [[(state, driven.empty)] for state in states]
        self.count = 0
        """Masks that were tried."""
        self.exact = [
            replay.finish(state, lambda _, call: output_of(driven.wanted(call))) for replay, state in zip(replays, states, strict=True)
        ]
        self._mask: Tensor | None = None
        self._along: list[list[tuple[State, Held]]] = self._starts

    @torch.no_grad()
    def images(self, mask_TN: Tensor) -> list[Tensor]:
        """The final images under a mask."""
        self.count += 1
        shared = self._shared(mask_TN)
        return [self._finish(replay, *along[shared], mask_TN) for replay, along in zip(self._replays, self._along, strict=True)]

    def error(self, mask_TN: Tensor) -> float:
        """The mean squared error of the final images under a mask."""
        return self._error(self.images(mask_TN))

    @torch.no_grad()
    def settle(self, mask_TN: Tensor) -> float:
        """Make a mask the one that others are forked from, and return its error."""
        along = []
        for replay, start in zip(self._replays, self._starts, strict=True):
            states, (state, held) = [], start[0]
            state = state.fork()
            for row in mask_TN.tolist():
                states.append((state.fork(), held))
                made, held = self.driven.step(replay.call(state), row, held)
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

    def _finish(self, replay: Replay, state: State, held: Held, mask_TN: Tensor) -> Tensor:
        state = state.fork()
        for row in mask_TN[state.step :].tolist():
            made, held = self.driven.step(replay.call(state), row, held)
            state = replay.advance(state, output_of(made))
        return state.x_BCHW


def mean_square(images: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The mean squared error over all images."""
    return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(images, exact, strict=True)) / sum(x.numel() for x in exact)


@dataclass
class Search:
    """A search for the mask of least error that meets a budget."""

    trials: Trials
    budget: Budget
    limit: int
    """Trials it may take."""
    log: list[tuple[int, float]] = field(default_factory=list)
    """(trials so far, error) whenever a mask was settled on."""

    def whole_steps(self, shape: tuple[int, int]) -> Tensor:
        """Reuse whole steps, each time the one that costs least error, while the budget allows another; then exchange them for better."""
        mask_TN = torch.ones(shape, dtype=torch.bool)
        best = self._settle(mask_TN)
        while True:
            room = [step for step in range(1, shape[0]) if bool(mask_TN[step].all()) and self.budget.reachable(_reused(mask_TN, step))]
            if not room or self.budget.saved(_reused(mask_TN, room[0])) > self.budget.saving * (1 + 1e-9) or self._spent():
                return self._exchanged(mask_TN, best)
            errors = {step: self.trials.error(_reused(mask_TN, step)) for step in room}
            mask_TN = _reused(mask_TN, min(errors, key=errors.__getitem__))
            best = self._settle(mask_TN)

    def _exchanged(self, mask_TN: Tensor, best: float) -> Tensor:
        """Let a whole step run and another rest in its place, the best such exchange first, until none lessens the error."""
        while True:
            out, back = ([step for step in range(1, len(mask_TN)) if bool(mask_TN[step].all()) == runs] for runs in (True, False))
            exchanged = (_reused(_running(mask_TN, again), step) for again in back for step in out)
            tries = [tried_TN for tried_TN in exchanged if self.budget.reachable(tried_TN)]
            errors = [self.trials.error(tried_TN) for tried_TN in tries if not self._spent()]
            if min(errors, default=math.inf) >= best:
                return mask_TN
            mask_TN = tries[errors.index(min(errors))]
            best = self._settle(mask_TN)

    def single_units(self, mask_TN: Tensor) -> Tensor:
        """Greedily reuse single units until the budget is met, each time the one with the least error for what it saves.

        Lazily: errors only grow as more is reused, nearly, so a trial of long ago is a bound, and only the best bound is tried again.
        """
        best = self._settle(mask_TN)
        queue = [(-math.inf, step, unit, -1) for step, unit in (mask_TN[1:].nonzero() + torch.tensor([1, 0])).tolist()]
        heapq.heapify(queue)
        picks = 0
        while queue and not self.budget.met(mask_TN):
            if self._spent():  # the best by what is known; slots that were never tried come last, early steps after late ones
                queue.sort(key=lambda entry: (math.isinf(entry[0]), entry[0], -entry[1]))
            _, step, unit, tried_at = queue.pop(0) if self._spent() else heapq.heappop(queue)
            if not self.budget.reachable(_without(mask_TN, step, unit)):  # nor would it be after further picks
                continue
            if tried_at != picks and not self._spent():
                error = self.trials.error(_without(mask_TN, step, unit))
                heapq.heappush(queue, ((error - best) / self.budget.cost_N[unit], step, unit, picks))
                continue
            mask_TN = _without(mask_TN, step, unit)
            best = self._settle(mask_TN)
            picks += 1
        return mask_TN

    def swaps(self, mask_TN: Tensor) -> Tensor:
        """Exchange slots that are reused for slots that are not, as long as that lessens the error and trials are left.

        Each round tries every slot alone for what it would change, then the pairs that promise most.
        """
        best = self._settle(mask_TN)
        while not self._spent():
            gains, losses = self._alone(mask_TN, best)
            pairs = sorted((losses[add] - gains[drop], drop, add) for drop in gains for add in losses)
            promising = [(drop, add) for change, drop, add in pairs if change < 0 and self._swapped(mask_TN, drop, add) is not None]
            better = False
            for drop, add in promising[: 4 * len(mask_TN)]:
                tried = self._swapped(mask_TN, drop, add)  # by now another exchange may have taken one of them
                if tried is not None and not self._spent() and self.trials.error(tried) < best:
                    mask_TN, better = tried, True
                    best = self._settle(mask_TN)
            if not better:
                break
        return mask_TN

    def _alone(self, mask_TN: Tensor, best: float) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
        """What running each reused slot would take from the error, and what reusing each of the others would add."""
        gains: dict[tuple[int, int], float] = {}
        losses: dict[tuple[int, int], float] = {}
        for step in range(len(mask_TN) - 1, 0, -1):  # the last are the cheapest to try
            for unit in range(mask_TN.shape[1]):
                if self._spent():
                    return gains, losses
                tried = mask_TN.clone()
                tried[step, unit] ^= True
                change = self.trials.error(tried) - best
                if bool(mask_TN[step, unit]):
                    losses[step, unit] = change
                else:
                    gains[step, unit] = -change
        return gains, losses

    def _swapped(self, mask_TN: Tensor, drop: tuple[int, int], add: tuple[int, int]) -> Tensor | None:
        """The mask in which `drop` runs again and `add` is reused; None where that is not so now, or the budget does not have it."""
        if bool(mask_TN[drop]) or not bool(mask_TN[add]):
            return None
        made = mask_TN.clone()
        made[drop], made[add] = True, False
        return made if self.budget.met(made) and self.budget.allowed(made) else None

    def _settle(self, mask_TN: Tensor) -> float:
        error = self.trials.settle(mask_TN)
        self.log.append((self.trials.count, error))
        return error

    def _spent(self) -> bool:
        return self.trials.count >= self.limit


def _reused(mask_TN: Tensor, step: int) -> Tensor:
    made = mask_TN.clone()
    made[step] = False
    return made


def _running(mask_TN: Tensor, step: int) -> Tensor:
    made = mask_TN.clone()
    made[step] = True
    return made


def _without(mask_TN: Tensor, step: int, unit: int) -> Tensor:
    made = mask_TN.clone()
    made[step, unit] = False
    return made
