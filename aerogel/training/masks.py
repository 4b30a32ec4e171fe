"""Which units of which steps to reuse, by the error of the final image itself: every trial is a real generation, forked where it differs.

T steps, N units. A mask (T, N) is True where a unit runs. What a mask saves is counted in any unit of cost: slots, MACs or seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from aerogel.data.replay import Replay, State, output_of, replays
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.model.reuse.driven import Driven, Held, driven
from aerogel.training.budgets import Budget
from aerogel.training.processes import averaged

Exchange = tuple[tuple[tuple[int, int], tuple[int, int]], ...]
"""Pairs of a slot (step, unit) that is reused and is to run, and one that runs and is to be reused."""
_NUMBERS = 2**16
"""Most numbers that are kept of how a slot moves the images."""


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

    def apart(self, mask_TN: Tensor | None = None) -> Tensor:
        """What the final images under a mask, or the settled one, are off by: all in one vector, hashed to fewer numbers if it is long."""
        images = [along[-1][0].x_BCHW for along in self._along] if mask_TN is None else self.images(mask_TN)
        apart = torch.cat([(a - b).flatten().float() for a, b in zip(images, self.exact, strict=True)])
        if len(apart) <= _NUMBERS:
            return apart
        generator = torch.Generator().manual_seed(0)  # the same places and signs each time, so that inner products stay, nearly
        places = torch.randint(_NUMBERS, apart.shape, generator=generator).to(apart.device)
        signs = torch.randint(2, apart.shape, generator=generator).to(apart.device) * 2.0 - 1
        return torch.zeros(_NUMBERS, device=apart.device).index_add_(0, places, signs * apart)

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
        return Trials(self.trials.driven, runs, [run.noise(self.generator) for run in runs])

    def facts(self, mask_TN: Tensor) -> dict[str, Any]:
        """What a policy's state says of a mask that was found: errors on both, the unseen ones' without reuse, trials, guidance."""
        seen, count = self.trials.settle(mask_TN), self.trials.count
        error, without = self.unseen.error(mask_TN), self.unseen.error(torch.ones_like(mask_TN))
        return {
            "error": error, "error_without_reuse": without, "error_of_trials": seen, "trials": count, "guidance": self.runs[0].guidance
        }  # fmt: skip


@contextmanager
def generating(network: Network, calls: Sequence[Call], samples: int) -> Iterator[Generations]:
    """Take over a denoiser to try masks on the first of its recorded generations, about as many pictures as `samples` says.

    Raises AerogelError when the calls do not replay.
    """
    recorded = replays(network, calls)
    runs = recorded[: max(1, math.ceil(samples / len(recorded[0].start().x_BCHW)))]
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    with driven(network) as denoiser, torch.no_grad():
        trials = Trials(denoiser, runs, [run.start() for run in runs])
        unseen = Trials(denoiser, runs, [run.noise(generator) for run in runs])
        yield Generations(runs, trials, unseen, generator)


def mean_square(images: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The mean squared error over all images."""
    return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(images, exact, strict=True)) / sum(x.numel() for x in exact)


@dataclass(frozen=True)
class _Moves:
    """What exchanges promise, if what single slots do to the final images adds up."""

    slots: list[tuple[int, int]]
    runs: list[bool]
    """Whether each runs as it is."""
    products: Tensor
    """Inner products (1 + slots, 1 + slots): of what images are off by as it is, and of how each slot, the other way, moves them."""

    def pairs(self) -> list[Exchange]:
        """Exchanges of two slots that lessen the error, the best first."""
        return [((self.slots[rests], self.slots[runs]),) for rests, runs in self._best(self.products[0, 1:], set())]

    def chains(self, allowed: Callable[[Exchange], Tensor | None], most: int = 16) -> Iterator[Exchange]:
        """Several exchanges at once, each chosen as the best after those before it: all of them first, then half, and so on."""
        chosen: list[tuple[tuple[int, int], tuple[int, int]]] = []
        taken: set[int] = set()
        along_S = self.products[0, 1:].clone()
        while len(chosen) < most:
            for rests, runs in self._best(along_S, taken):
                if allowed((*chosen, (self.slots[rests], self.slots[runs]))) is not None:
                    break
            else:
                break
            chosen.append((self.slots[rests], self.slots[runs]))
            taken |= {rests, runs}
            along_S += self.products[1 + rests, 1:] + self.products[1 + runs, 1:]
        length = len(chosen)
        while length > 1:
            yield tuple(chosen[:length])
            length //= 2

    def _best(self, along_S: Tensor, taken: set[int]) -> list[tuple[int, int]]:
        """Places of a slot that rests and one that runs, by what exchanging them takes from the error; only those that do."""
        resting, running = (
            [place for place, runs in enumerate(self.runs) if runs == want and place not in taken] for want in (False, True)
        )
        gram_SS = self.products[1:, 1:]
        alone_S = 2 * along_S + gram_SS.diagonal()
        change_RR = alone_S[resting, None] + alone_S[None, running] + 2 * gram_SS[resting][:, running]
        order = change_RR.flatten().argsort()[: int((change_RR < 0).sum())].tolist()
        return [(resting[place // len(running)], running[place % len(running)]) for place in order]


@dataclass
class Search:
    """A search for the mask of least error that meets a budget."""

    trials: Trials
    budget: Budget
    limit: int
    """Trials it may take."""
    others: Trials | None = None
    """Generations of other noise, on which an exchange has to lessen the error too."""
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

        Each round tries every slot alone for how it moves the images, then the exchanges, several at once and one at a time, that promise
        most if such moves add up.
        """
        best, better = self._settle(mask_TN), True
        while better and not self._spent():
            moves, better = self._moves(mask_TN), False
            for exchange in chain(moves.chains(partial(self._swapped, mask_TN)), moves.pairs()[: 4 * len(mask_TN)]):
                tried = self._swapped(mask_TN, exchange)  # by now another exchange may have taken one of its slots
                if tried is not None and not self._spent() and self.trials.error(tried) < best and self._confirmed(tried):
                    mask_TN, better = tried, True
                    best = self._settle(mask_TN)
        return mask_TN

    def _moves(self, mask_TN: Tensor) -> _Moves:
        """How each slot alone would move the images, the last first, which are the cheapest to try; of as many as trials are left for."""
        slots = [(step, unit) for step in range(len(mask_TN) - 1, 0, -1) for unit in range(mask_TN.shape[1])]
        moved = [self.trials.apart()]
        for slot in slots:
            if self._spent():
                break
            tried = mask_TN.clone()
            tried[slot] ^= True
            moved.append(self.trials.apart(tried) - moved[0])
        return _Moves(slots[: len(moved) - 1], [bool(mask_TN[slot]) for slot in slots[: len(moved) - 1]], self.trials.products(moved))

    def _swapped(self, mask_TN: Tensor, exchange: Exchange) -> Tensor | None:
        """The mask after an exchange; None where one of its slots is not what it was, or the budget does not have it."""
        made = mask_TN.clone()
        for rests, runs in exchange:
            if bool(made[rests]) or not bool(made[runs]):
                return None
            made[rests], made[runs] = True, False
        return made if self.budget.met(made) and self.budget.allowed(made) else None

    def _confirmed(self, mask_TN: Tensor) -> bool:
        return self.others is None or self.others.error(mask_TN) < self._others_error

    def _settle(self, mask_TN: Tensor) -> float:
        error = self.trials.settle(mask_TN)
        if self.others is not None:
            self._others_error = self.others.settle(mask_TN)
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
