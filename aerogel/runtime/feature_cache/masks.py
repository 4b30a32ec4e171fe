"""Search for the modules and steps to reuse, by the error of the final image: whole steps first, then single modules, then exchanges.

T steps, N modules. A mask (T, N) is True where a module runs. What a mask saves is counted in entries, MACs or seconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, takewhile

import torch
from torch import Tensor

from aerogel.runtime.feature_cache.budgets import Budget
from aerogel.runtime.feature_cache.trials import Trials

Part = tuple[tuple[int, int], ...]
"""Entries (step, module) of a schedule that run or are skipped together: a single one, or all of a step."""
Exchange = tuple[tuple[Part, Part], ...]
"""Pairs of a part that is skipped and is to run, and one that runs and is to be skipped."""
_TRIES = 40
"""Single exchanges that are tried in a round, at most."""


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
        """Reuse whole steps while the budget has room for another, then exchange them for better ones."""
        steps = [tuple((step, module) for module in range(shape[1])) for step in range(1, shape[0])]
        return self._exchanged(self._with_reuse(torch.ones(shape, dtype=torch.bool), steps, beyond=False), steps)

    def single_modules(self, mask_TN: Tensor) -> Tensor:
        """Reuse single modules until the budget is met."""
        return self._with_reuse(mask_TN, _entries(mask_TN), beyond=True)

    def swaps(self, mask_TN: Tensor) -> Tensor:
        """Exchange single modules that are reused for others that are not."""
        return self._exchanged(mask_TN, _entries(mask_TN))

    def _with_reuse(self, mask_TN: Tensor, parts: Sequence[Part], *, beyond: bool) -> Tensor:
        """Greedily let parts rest until the budget is met, each time the one with the least error for what it saves.

        Lazily: errors only grow as more is reused, nearly, so a trial of long ago is a bound, and only the best bound is tried again.
        `beyond` is whether the last may save more than was missing.
        """
        best = self.settle(mask_TN)
        queue = [(-math.inf, part, -1) for part in parts if _all(mask_TN, part, runs=True)]
        picks = 0
        while queue and not self.budget.is_met(mask_TN):
            if self._spent():  # the best by what is known; parts that were never tried come last, early steps after late ones
                queue.sort(key=lambda entry: (math.isinf(entry[0]), entry[0], -entry[1][0][0]))
            _, part, tried_at = queue.pop(0) if self._spent() else heapq.heappop(queue)
            made = _turned(mask_TN, part)
            too_much = not beyond and self.budget.saved(made) > self.budget.saving * (1 + 1e-9)
            if too_much or not self.budget.reachable(made):  # nor would it be after further picks
                continue
            if tried_at != picks and not self._spent():
                cost = sum(self.budget.cost_N[module] for _, module in part)
                heapq.heappush(queue, ((self.trials.error(made) - best) / cost, part, picks))
                continue
            mask_TN = made
            best = self.settle(mask_TN)
            picks += 1
        return mask_TN

    def _exchanged(self, mask_TN: Tensor, parts: Sequence[Part]) -> Tensor:
        """Exchange parts as long as that lessens the error and trials are left.

        Each round tries every part alone for how it moves the images, then the exchanges, several at once and one at a time, that promise
        most if such moves add up.
        """
        best, better = self.settle(mask_TN), True
        while better and not self._spent():
            moves, better = self.moves(mask_TN, parts), False
            for exchange in chain(moves.chains(partial(self.swapped, mask_TN)), islice(moves.pairs(), _TRIES)):
                tried = self.swapped(mask_TN, exchange)  # by now another exchange may have taken one of its parts
                if tried is not None and not self._spent() and self.trials.error(tried) < best and self._confirmed(tried):
                    mask_TN, better = tried, True
                    best = self.settle(mask_TN)
        return mask_TN

    def moves(self, mask_TN: Tensor, parts: Sequence[Part]) -> Moves:
        """Return how each part alone would move the images, the last first (the cheapest to try); as many as trials are left for."""
        whole = [part for part in reversed(parts) if _all(mask_TN, part, runs=True) or _all(mask_TN, part, runs=False)]
        moved = [self.trials.apart()]
        for part in whole:
            if self._spent():
                break
            moved.append(self.trials.apart(_turned(mask_TN, part)) - moved[0])
        tried = whole[: len(moved) - 1]
        return Moves(tried, [bool(mask_TN[part[0]]) for part in tried], self.trials.products(moved))

    def swapped(self, mask_TN: Tensor, exchange: Exchange) -> Tensor | None:
        """The mask after an exchange; None where one of its parts is not what it was, or less would be saved than was and has to be."""
        made = mask_TN
        for skips, runs in exchange:
            if not _all(made, skips, runs=False) or not _all(made, runs, runs=True):
                return None
            made = _turned(_turned(made, skips), runs)
        enough = self.budget.saved(made) >= min(self.budget.saving, self.budget.saved(mask_TN)) * (1 - 1e-9)
        return made if enough and self.budget.reachable(made) else None

    def _confirmed(self, mask_TN: Tensor) -> bool:
        return self.others is None or self.others.error(mask_TN) < self._others_error

    def settle(self, mask_TN: Tensor) -> float:
        error = self.trials.settle(mask_TN)
        if self.others is not None:
            self._others_error = self.others.error(mask_TN)  # not settled on: what forks need is kept for each step, of many images
        self.log.append((self.trials.count, error))
        return error

    def _spent(self) -> bool:
        return self.trials.count >= self.limit


@dataclass(frozen=True)
class Moves:
    """Expected gain of exchanges, if the effects of single parts on the final images add up."""

    parts: list[Part]
    runs: list[bool]
    """True for each part that runs."""
    products: Tensor
    """Inner products (1 + parts, 1 + parts): of what images are off by as it is, and of how each part, the other way, moves them."""

    def pairs(self) -> Iterator[Exchange]:
        """All exchanges of two parts, the most promising first."""
        for skips, runs, _ in self._best(self.products[0, 1:], set()):
            yield ((self.parts[skips], self.parts[runs]),)

    def chains(self, allowed: Callable[[Exchange], Tensor | None], most: int = 16) -> Iterator[Exchange]:
        """Several exchanges at once, each chosen as the best after those before it: all that lessen the error, then half, and so on."""
        chosen: list[tuple[Part, Part]] = []
        taken: set[int] = set()
        along_S = self.products[0, 1:].clone()
        while len(chosen) < most:
            promising = takewhile(lambda found: found[2] < 0, self._best(along_S, taken))
            pairs = ((skips, runs, (self.parts[skips], self.parts[runs])) for skips, runs, _ in promising)
            best = next((found for found in pairs if allowed((*chosen, found[2])) is not None), None)
            if best is None:
                break
            skips, runs, pair = best
            chosen.append(pair)
            taken |= {skips, runs}
            along_S += self.products[1 + skips, 1:] + self.products[1 + runs, 1:]
        length = len(chosen)
        while length > 1:
            yield tuple(chosen[:length])
            length //= 2

    def _best(self, along_S: Tensor, taken: set[int]) -> Iterator[tuple[int, int, float]]:
        """Places of a part that is skipped and one that runs, and what exchanging them adds to the error, the least first."""
        free = [place for place in range(len(self.parts)) if place not in taken]
        caching_inner_blocks, running = ([place for place in free if self.runs[place] == runs] for runs in (False, True))
        gram_SS = self.products[1:, 1:]
        alone_S = 2 * along_S + gram_SS.diagonal()
        change_RR = alone_S[caching_inner_blocks, None] + alone_S[None, running] + 2 * gram_SS[caching_inner_blocks][:, running]
        changes, order = change_RR.flatten().sort()
        for place, change in zip(order.tolist(), changes.tolist(), strict=True):
            yield caching_inner_blocks[place // len(running)], running[place % len(running)], change


def _entries(mask_TN: Tensor) -> list[Part]:
    """Every cache entry behind the first step, by itself."""
    return [((step, module),) for step in range(1, len(mask_TN)) for module in range(mask_TN.shape[1])]


def _all(mask_TN: Tensor, part: Part, *, runs: bool) -> bool:
    return all(bool(mask_TN[entry]) == runs for entry in part)


def _turned(mask_TN: Tensor, part: Part) -> Tensor:
    made = mask_TN.clone()
    for entry in part:
        made[entry] ^= True
    return made
