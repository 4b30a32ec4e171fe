"""Policies brought to a speed: a pipeline denoises with one and without in turns, and the weakest setting that is fast enough is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from aerogel.data.denoising import Denoising
from aerogel.data.latents import denoising_seconds
from aerogel.engine import policies
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.search.candidates import chosen
from aerogel.engine.stages import seeded
from aerogel.errors import AerogelError
from aerogel.methods.feature_cache.policy import BudgetedCachePolicy, FeatureCachePolicy, ScheduleRefiner
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Step, build

_NEAR, _OVER = 0.98, 1.1
"""A speed is enough from this share of the budget on, since measured times tremble; above the other one a target is asked for again."""
_ASKS = 3
"""Times that a policy with a target speed-up is made anew until its measured speed fits."""
_TARGETS = ("target_speedup", "ratio")


@dataclass
class SpeedBudget:
    """Speed-up that denoising has to reach, and the way it is measured."""

    network: Network
    wanted: Denoising
    """Work of a turn."""
    budget: float
    """Times faster."""
    seed: int
    """Of the noise."""
    rounds: int
    """Turns that count, after one that does not: kernels are chosen and memory grows in it."""
    clock: Callable[[], float]
    whole: list[float] = field(default_factory=list)
    """Seconds of the turns without a policy."""

    def speedup(self, on: Callable[[], AbstractContextManager[Any]] = nullcontext, steps: int | None = None) -> float:
        """Return the speed-up of denoising under a policy, or with fewer steps: the median of the ratios within rounds."""
        wanted, ratios = replace(self.wanted, steps=steps or self.wanted.steps), []
        if not self.whole:
            self._turn(self.wanted)
        self._turn(wanted, on)
        for _ in range(self.rounds):
            self.whole.append(self._turn(self.wanted))
            ratios.append(self.whole[-1] / self._turn(wanted, on))
        return median(ratios)

    def is_met(self, speedup: float) -> bool:
        """Return True where that is fast enough."""
        return speedup >= _NEAR * self.budget

    def _turn(self, wanted: Denoising, on: Callable[[], AbstractContextManager[Any]] = nullcontext) -> float:
        with seeded(self.seed), on():
            return denoising_seconds(self.network.processor, self.network.module, wanted, self.seed, self.clock)


@dataclass(frozen=True)
class Candidate:
    """A policy that may be chosen."""

    name: str
    cls: type[FeatureCachePolicy[Any]]
    options: Mapping[str, Any]
    """Note about it."""

    @property
    def option(self) -> str:
        """The option that sets its speed; empty where it has none."""
        if self.cls.search_space is not None:
            return self.cls.search_space[0]
        return next((name for name in _TARGETS if name in self.options), _TARGETS[0]) if issubclass(self.cls, BudgetedCachePolicy) else ""

    @property
    def values(self) -> tuple[Any, ...]:
        """Values of that option to try, in order of rising speed: the one that was said, else those that the policy names."""
        if self.option in self.options:
            return (self.options[self.option],)
        return self.cls.search_space[1] if self.cls.search_space is not None else ()

    def step(self, value: Any) -> Step:
        """The policy with a value of that option; raises AerogelError for an option that it lacks."""
        method = build(self.cls, {**self.options, self.option: value}, f"policy {self.name!r}")
        return Step(self.name, method)


def candidates(only: Sequence[str] = (), overrides: Iterable[str] = ()) -> list[Candidate]:
    """The policies to compare: all that reuse by themselves, or those that are named; `overrides` are `policy.option=value`.

    Raises AerogelError for a name that no such policy bears, and for unknown options and wrong values.
    """
    return [Candidate(name, cls, options) for name, (cls, options) in chosen(_unfit, only, overrides).items()]


def _unfit(cls: type) -> str:
    if issubclass(cls, FeatureCachePolicy) and not issubclass(cls, ScheduleRefiner):
        return ""
    why = "goes on from another policy's schedule" if issubclass(cls, ScheduleRefiner) else "does not reuse anything"
    return f"{why}, so it is no cache to choose"


class Try(NamedTuple):
    """A setting of a policy."""

    value: Any
    """Of the option that sets its speed."""
    speedup: float
    """Measured."""
    seconds: float
    """To make it."""


class TunedPolicy(NamedTuple):
    """A policy at the speed that is wanted."""

    measured: CalibratedPolicy
    at: Try


class Attempt:
    """A policy on its way to the speed that is wanted."""

    def __init__(self, candidate: Candidate, calls: Sequence[Call], pace: SpeedBudget, seed: int) -> None:
        self.candidate = candidate
        self.tries: list[Try] = []
        self.brought: TunedPolicy | None = None
        self._enough: list[TunedPolicy] = []
        self._calls, self._pace, self._seed = calls, pace, seed
        self._refusal = "it names no option that makes it faster (strengths), and takes no target"

    def run(self) -> None:
        """Try settings, and keep the weakest that is fast enough, or the slowest where a target is asked for."""
        if self.candidate.values:
            self._halve(self.candidate.values)
            self.brought = self._enough[-1] if self._enough else None
        elif self.candidate.option:
            self._ask()
            self.brought = min(self._enough, key=lambda one: one.at.speedup, default=None)

    @property
    def reason(self) -> str:
        """Why it was not brought there."""
        if not self.tries:
            return self._refusal
        fastest = max(self.tries, key=lambda one: one.speedup)
        return f"it makes denoising {fastest.speedup:.2f} times as fast at the most ({self.candidate.option} {fastest.value:g})"

    def _halve(self, values: Sequence[Any]) -> None:
        """Halve the values that are left, towards the weakest that is fast enough; what is refused is too strong."""
        low, high = 0, len(values)
        while low < high:
            middle = (low + high) // 2
            speedup = self._at(values[middle])
            if speedup is None or self._pace.is_met(speedup):
                high = middle
            else:
                low = middle + 1

    def _ask(self) -> None:
        """Ask for the speed that is wanted, and for more or less where what comes is another one."""
        budget = self._pace.budget
        asked = budget
        for _ in range(_ASKS):
            speedup = self._at(round(asked, 4))
            if speedup is None or (self._pace.is_met(speedup) and speedup <= _OVER * budget):
                return
            asked = 1 + (asked - 1) * (budget - 1) / max(speedup - 1, 0.1 * (budget - 1))

    def _at(self, value: Any) -> float | None:
        """The measured speed-up at a value; None where the policy refuses it."""
        pace = self._pace
        try:
            step = self.candidate.step(value)
            start = pace.clock()
            with seeded(self._seed, 0):
                measured = policies.calibrated(pace.network, step, self._calls)
            taken = pace.clock() - start
            speedup = pace.speedup(partial(policies.on, pace.network, [measured]))
        except AerogelError as error:
            self._refusal = str(error)
            return None
        self.tries.append(Try(value, speedup, taken))
        if pace.is_met(speedup):
            self._enough.append(TunedPolicy(measured, self.tries[-1]))
        return speedup


def fewer_steps(pace: SpeedBudget) -> tuple[int, float]:
    """The most steps with which the pipeline alone is fast enough, and how many times faster it is then.

    Raises AerogelError when it cannot run with fewer steps, or not so fast with any.
    """
    whole = pace.wanted.steps
    for steps in range(min(whole - 1, math.ceil(whole / pace.budget)), 0, -1):
        speedup = pace.speedup(steps=steps)
        if pace.is_met(speedup):
            return steps, speedup
    raise AerogelError(f"with none of the numbers of steps below {whole} denoising is {pace.budget:g} times as fast")
