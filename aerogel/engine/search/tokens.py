"""The search for a rule that drops tokens: all rules at one speed of reading prompts, or one share of tokens.

Rules for images are judged on chats, rules for long prompts on text: by what is predicted behind a prompt that was read with the rule.
On needle prompts they are judged by the numbers that are found, and among equals by these predictions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from aerogel.data import text
from aerogel.data.chats import Chats
from aerogel.data.needles import Needles
from aerogel.engine import policies
from aerogel.engine.calibration import CalibrationInput
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.progress import Event, Tell
from aerogel.engine.requirements import unmet
from aerogel.engine.search.candidates import chosen
from aerogel.engine.search.held_out import halves, wanted_of
from aerogel.engine.search.judging_answers import Judge, rank
from aerogel.engine.search.pictures import pictures
from aerogel.engine.stages import seeded
from aerogel.errors import AerogelError
from aerogel.kernels.synchronized_clock import now
from aerogel.methods.base import Before, CalibrationSize
from aerogel.methods.tokens.policy import DroppingPolicy, TokenState
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.recipe import Step, build
from aerogel.runtime.tokens.decoder import decoder_of

BUDGET = "2x"
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.11, 0.08, 0.06, 0.04, 0.03, 0.02)
"""Shares of tokens that rules are tried at, the weakest first."""
_NEAR = 0.98
"""A speed is enough from this share of the budget on, since measured times tremble."""
_BEHIND = 32
"""Tokens behind each prompt of text whose predictions are compared."""
_NO_SIZE = Before(CalibrationSize(0, 0, 0))


class Target(NamedTuple):
    """Budget of a search."""

    speed: float | None
    """Times that prompts are to be read faster."""
    share: float | None
    """Share of the tokens that is to be computed at most, on average over the blocks."""

    @classmethod
    def of(cls, budget: float | str) -> Target:
        """Read a budget such as 2x or 25%; raises AerogelError for others."""
        said = str(budget).strip()
        if (speed := re.fullmatch(r"(\d+(?:\.\d+)?)x", said)) and 1 < float(speed[1]) <= 1000:
            return cls(float(speed[1]), None)
        if (share := re.fullmatch(r"(\d+(?:\.\d+)?)%", said)) and 0 < float(share[1]) < 100:
            return cls(None, float(share[1]) / 100)
        raise AerogelError(f"budget {budget!r} is neither a speed-up of prefill, such as 2x, nor a share of tokens to compute, such as 25%")

    def __str__(self) -> str:
        return f"{self.speed:g}x" if self.speed is not None else f"{100 * (self.share or 0):g}%"


class TunedRule(NamedTuple):
    """A rule at the weakest strength that meets the budget."""

    measured: CalibratedPolicy
    seconds: float
    """To bring it there."""

    @property
    def kept(self) -> float:
        """The share of tokens that is computed on the calibration data."""
        state = self.measured.state
        assert isinstance(state, TokenState)
        return state.kept


class TokenSearch:
    """A search on its way."""

    def __init__(
        self, budget: float | str | None, only: Sequence[str], overrides: Iterable[str], rounds: int, tell: Tell, clock: Callable[[], float]
    ) -> None:
        """Raises AerogelError for a budget that is none, and for policies that drop no tokens."""
        self.target = Target.of(BUDGET if budget is None else budget)
        self._tried = chosen(_unfit, only, overrides)
        self._rounds, self._tell, self._clock = rounds, tell, clock
        self._brought: list[TunedRule] = []
        self._left_out: dict[str, str] = {}
        self.best: CalibratedPolicy | None = None

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """Raises AerogelError for a network without a decoder or with a rule on, and for recorded calls."""
        decoder_of(network)
        wanted = wanted_of(network, samples)
        on = [measured.step for measured in policies.load(network.origin) if isinstance(measured.step.method, DroppingPolicy)]
        if on:
            raise AerogelError(f"{network.origin} has {on[0].name} on already; give the model that it was made for")
        self._network, self._wanted = network, wanted

    def prepare(self, seed: int) -> dict[str, Any]:
        """Read twice as much as is asked for: one half is calibrated on, the other is for the judge."""
        self._seed, wanted = seed, self._wanted
        if isinstance(wanted, Chats | Needles):
            self._calls, self._held_out, facts = halves(self._network, wanted, seed)
            return facts
        # Prompts have the length that was asked for, since rules act from some length on; what is judged comes behind them.
        calls, held_out, facts = halves(self._network, replace(wanted, length=wanted.length + _BEHIND), seed)
        self._calls = text.calls(torch.cat([call.kwargs["input_ids"] for call in calls])[:, : wanted.length], wanted.batch)
        self._held_out = replace(held_out, prompt=wanted.length)
        return facts

    def bring(self) -> None:
        """Find for each rule the weakest strength that meets the budget."""
        for number, (name, (cls, options)) in enumerate(self._tried.items()):
            self._tell(Event("compress", number, len(self._tried), name))
            start = self._clock()
            try:
                found = self._weakest(name, cls, options)
            except AerogelError as error:
                self._left_out[name] = str(error)
                continue
            self._brought.append(TunedRule(found, self._clock() - start))

    def judge(self) -> dict[str, Any]:
        """Hold all that was brought to the budget against the model with all tokens; return the facts."""
        total = len(self._brought) + 1
        self._tell(Event("evaluate", 0, total, "the model with all tokens"))
        judge = Judge(self._network, self._held_out, self._rounds, self._clock)
        rows: list[dict[str, Any]] = []
        for number, brought in enumerate(self._brought, 1):
            self._tell(Event("evaluate", number, total, brought.measured.step.name))
            step = brought.measured.step
            about = {"policy": step.name, "step": step.as_dict(), "kept": brought.kept, "seconds": brought.seconds}
            rows.append(about | judge.policy(partial(policies.on, self._network, [brought.measured])))
        finite = [place for place, row in enumerate(rows) if math.isfinite(row["kl"])]
        if finite:
            self.best = self._brought[min(finite, key=lambda place: rank(rows[place], bool(self._held_out.needles)))].measured
        shown = pictures(self._network, self.best, self._held_out.chats) if self.best is not None else []
        left_out = [{"policy": name, "reason": reason} for name, reason in self._left_out.items()]
        return judge.conditions | {"budget": str(self.target), "rows": rows, "left_out": left_out, "pictures": shown}

    def _weakest(self, name: str, cls: type[DroppingPolicy], options: Mapping[str, Any]) -> CalibratedPolicy:
        """Halve the strengths that are left, towards the weakest that is enough; raises AerogelError where none is, or it does not fit."""
        if cls.drops_text and self._held_out.chats:
            raise AerogelError(
                "it drops tokens of text, so it is compared on what is read behind prompts of text: give text or needles by --data"
            )
        strengths = _strengths(cls)
        if clash := [key for key in strengths[0] if key in options]:
            raise AerogelError(f"{name}.{clash[0]} is what the budget says here; leave it out")
        low, high, best = 0, len(strengths), None
        said = ""
        while low < high:
            middle = (low + high) // 2
            measured = self._calibrated(name, cls, {**options, **strengths[middle]})
            enough, said = self._met(measured)
            if enough:
                high, best = middle, measured
            else:
                low = middle + 1
        if best is None:
            strongest = ", ".join(f"{key}={value}" for key, value in strengths[-1].items())
            raise AerogelError(f"at its strongest ({strongest}) {said}")
        return best

    def _calibrated(self, name: str, cls: type[DroppingPolicy], options: Mapping[str, Any]) -> CalibratedPolicy:
        step = Step(name, build(cls, options, f"policy {name!r}"))
        unfit = [*unmet(self._network, step, [], _NO_SIZE), *step.method.unsuitable(self._network, self._calls)]
        if unfit:
            raise AerogelError(unfit[0].removeprefix(f"{name}: "))
        with seeded(self._seed):
            return policies.calibrated(self._network, step, self._calls)

    def _met(self, measured: CalibratedPolicy) -> tuple[bool, str]:
        """Return True where a rule meets the budget, and how far it goes in words."""
        if self.target.share is not None:
            state = measured.state
            assert isinstance(state, TokenState)
            return state.kept <= self.target.share + 1e-9, f"{state.kept:.1%} of the tokens are computed on average over the blocks"
        speedup = self._speedup(partial(policies.on, self._network, [measured]))
        assert self.target.speed is not None
        return speedup >= _NEAR * self.target.speed, f"prompts are read {speedup:.2f} times as fast"

    def _speedup(self, on: Callable[[], AbstractContextManager[Any]]) -> float:
        """Times that prompts are read faster: the median of rounds with and without, in turns."""
        self._prefill(nullcontext)
        self._prefill(on)
        return median(self._prefill(nullcontext) / self._prefill(on) for _ in range(self._rounds))

    def _prefill(self, on: Callable[[], AbstractContextManager[Any]]) -> float:
        prompts = self._held_out.prompts(self._network)
        call = Call((), {**prompts, "use_cache": True, "logits_to_keep": 1})
        with on():
            start = now(self._network.device, self._clock)
            self._network.run(call)
            return now(self._network.device, self._clock) - start


def _unfit(cls: type) -> str:
    return "" if issubclass(cls, DroppingPolicy) else "drops no tokens, so there is nothing to choose"


def _strengths(cls: type[DroppingPolicy]) -> list[dict[str, Any]]:
    """Options at which a rule is tried, the weakest first; raises AerogelError for a rule that names none."""
    if cls.search_space is not None:
        option, values = cls.search_space
        return [{option: value} for value in values]
    found = [cls.strength(share) for share in SHARES]
    if not all(found):
        raise AerogelError("it names no budget that the search could set")
    return found
