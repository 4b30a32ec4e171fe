"""The search for a cache: all policies at one measured speed, judged by the images that they make of held-out noise; the best is kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from aerogel.data.denoising import Denoising
from aerogel.engine import policies
from aerogel.engine.calibration import CalibrationInput, prepare, shown
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.progress import Event, Tell
from aerogel.engine.search.judging_images import Judge
from aerogel.engine.search.pacing import Attempt, SpeedBudget, TunedPolicy, candidates, fewer_steps
from aerogel.errors import AerogelError
from aerogel.evaluate.measure import pipeline_of
from aerogel.methods.feature_cache.policy import FeatureCachePolicy
from aerogel.model.hooks import uncompiled
from aerogel.model.network import Network
from aerogel.runtime.feature_cache.cached_modules import cached_modules_of
from aerogel.training.fit import watched

BUDGET = 1.5


class CacheSearch:
    """A search on its way.

    Policies with a target speed-up are asked for it, those with a strength get the least one that is fast enough. Errors are of as many
    images of other noise as were recorded. The same pipeline with fewer steps always stands beside them.
    """

    def __init__(
        self, budget: float | str | None, only: Sequence[str], overrides: Iterable[str], rounds: int, tell: Tell, clock: Callable[[], float]
    ) -> None:
        """Raises AerogelError for a budget that is no speed-up, and for policies that reuse nothing."""
        self.budget = _checked(BUDGET if budget is None else budget)
        self._tried = candidates(only, overrides)
        self._rounds, self.tell, self._clock = rounds, tell, clock
        self._attempts: list[Attempt] = []
        self._fewer: tuple[int, float] | None = None
        self._without = ""
        self.best: CalibratedPolicy | None = None

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """Raises AerogelError for a network without a pipeline or with a policy of reuse on, and for recorded calls."""
        self.network, self.wanted = network, _images_of(network, samples)

    def prepare(self, seed: int) -> dict[str, Any]:
        """Let the pipeline make the images to calibrate on."""
        calibration = prepare(self.network, self.wanted, seed, head=False)
        self._calls, self._seed = calibration.calls, seed
        turn = replace(self.wanted, count=min(self.wanted.count, self.wanted.batch))
        self.pace = SpeedBudget(self.network, turn, self.budget, seed + 1, self._rounds, self._clock)
        return calibration.facts

    def bring(self) -> None:
        """Bring each policy to the budget, and the pipeline alone by fewer steps."""
        total = len(self._tried) + 1
        for number, candidate in enumerate(self._tried):
            at = Event("compress", number, total, candidate.name)
            self.tell(at)
            self._attempts.append(Attempt(candidate, self._calls, self.pace, self._seed))
            with watched(partial(self._inside, at)):
                self._attempts[-1].run()
        self.tell(Event("compress", total - 1, total, "fewer steps"))
        try:
            self._fewer = fewer_steps(self.pace)
        except AerogelError as error:
            self._without = str(error)

    def judge(self) -> dict[str, Any]:
        """Hold all that is fast enough against the whole network on other noise; the facts, best first."""
        with uncompiled(self.network.module):  # what runs inside of blocks is looked at
            return self._judged()

    def _judged(self) -> dict[str, Any]:
        brought = [(attempt, attempt.brought) for attempt in self._attempts if attempt.brought is not None]
        total = len(brought) + 2
        self.tell(Event("evaluate", 0, total, "the whole denoiser"))
        judge = Judge(self.network, self.wanted, self.pace.seed)
        judged = []
        for number, (attempt, found) in enumerate(brought, 1):
            self.tell(Event("evaluate", number, total, attempt.candidate.name))
            judged.append((_row(attempt, found) | judge.policy(partial(policies.on, self.network, [found.measured])), found.measured))
        self.tell(Event("evaluate", total - 1, total, "fewer steps"))
        judged.sort(key=lambda pair: (not math.isfinite(pair[0]["error"]), pair[0]["error"]))
        if judged and math.isfinite(judged[0][0]["error"]):
            self.best = judged[0][1]
        return self._conditions(judge) | {
            "budget": self.budget,
            "rows": [row for row, _ in judged],
            "fewer": None if self._fewer is None else self._of_fewer(judge, *self._fewer),
            "without_fewer": self._without,
            "left_out": [
                {"policy": attempt.candidate.name, "reason": attempt.reason, "tries": _tries(attempt)}
                for attempt in self._attempts
                if attempt.brought is None
            ],
        }

    def _conditions(self, judge: Judge) -> dict[str, Any]:
        return {
            "sampler": type(self.network.processor.scheduler).__name__,
            "steps": judge.steps,
            "modules": list(judge.modules),
            "guidance": self.wanted.guidance,
            "count": self.wanted.count,
            "held_out_seed": self.pace.seed,
            "batch": self.pace.wanted.count,
            "rounds": self.pace.rounds,
            "seconds": median(self.pace.whole) if self.pace.whole else None,
            "variance": judge.variance,
            "images": judge.images,
            "subjects": judge.subjects,
        }

    def _of_fewer(self, judge: Judge, steps: int, speedup: float) -> dict[str, Any]:
        return {"policy": "fewer steps", "option": "steps", "value": steps, "speedup": speedup, **judge.fewer(steps)}

    def _inside(self, at: Event, share: float) -> None:
        self.tell(replace(at, inside=share))


def _checked(budget: float | str) -> float:
    """The budget as a number."""
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[x×]?\s*", str(budget))
    if read is None or float(read[1]) <= 1:
        raise AerogelError(f"budget {budget!r} is no speed-up; give how many times faster denoising has to be, for example 1.5x")
    return float(read[1])


def _images_of(network: Network, samples: CalibrationInput | None) -> Denoising:
    """Images on which policies are compared."""
    pipeline_of(network)
    wanted = shown(network, samples)
    if not isinstance(wanted, Denoising):
        raise AerogelError("policies are compared by the images that a pipeline makes: give a Denoising as samples, not recorded calls")
    cached_modules_of(network)
    on = [measured.step for measured in policies.load(network.origin) if isinstance(measured.step.method, FeatureCachePolicy)]
    if on:
        raise AerogelError(f"{network.origin} has {on[0].name} on already; give the pipeline that it was made for")
    return wanted


def _row(attempt: Attempt, found: TunedPolicy) -> dict[str, Any]:
    return {
        "policy": attempt.candidate.name,
        "option": attempt.candidate.option,
        "value": found.at.value,
        "step": found.measured.step.as_dict(),
        "speedup": found.at.speedup,
        "seconds": found.at.seconds,
        "tries": _tries(attempt),
    }


def _tries(attempt: Attempt) -> list[dict[str, Any]]:
    return [one._asdict() for one in attempt.tries]
