"""The search for a rule that skips experts: all policies at several shares of dropped assignments, judged on data they have not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from aerogel.engine import policies
from aerogel.engine.calibration import CalibrationInput
from aerogel.engine.policies import CalibratedPolicy
from aerogel.engine.progress import Event, Tell
from aerogel.engine.search.candidates import chosen
from aerogel.engine.search.held_out import halves, wanted_of
from aerogel.engine.search.judging_answers import SkipJudge
from aerogel.engine.stages import seeded
from aerogel.errors import AerogelError
from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.model.network import Network
from aerogel.recipe import Step, build
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import shape_of
from aerogel.runtime.expert_skipping.thresholds import UnreachableError
from aerogel.runtime.token_types import Vocabulary

BUDGET = 0.67
RATIOS = (0.5, 0.67, 0.75, 0.88)
"""Shares of dropped assignments that curves go through, beside the one that is asked for."""
_SHORT = 0.005
"""A policy meets a share that it misses by no more than this."""


class TunedRule(NamedTuple):
    """A policy at a share of dropped assignments, or at the most that it drops."""

    asked: float
    measured: CalibratedPolicy
    seconds: float
    """To calibrate it."""

    @property
    def met(self) -> bool:
        """True where it drops what was asked for on the calibration data."""
        return self.dropped >= self.asked - _SHORT

    @property
    def dropped(self) -> float:
        """The share of assignments that it drops on the calibration data."""
        state = self.measured.state
        assert isinstance(state, ExpertSkippingState)
        return state.skipped


class SkipSearch:
    """A search on its way."""

    def __init__(
        self, budget: float | str | None, only: Sequence[str], overrides: Iterable[str], rounds: int, tell: Tell, clock: Callable[[], float]
    ) -> None:
        """Raises AerogelError for a budget that is no share, and for policies that skip no experts."""
        self.budget = _share(BUDGET if budget is None else budget)
        self._tried = chosen(_unfit, only, overrides)
        if set_ := [name for name, (_, options) in self._tried.items() if "ratio" in options]:
            raise AerogelError(f"{set_[0]}.ratio is what the budget says here; leave it out")
        self.ratios = sorted({*RATIOS, self.budget})
        self._rounds, self._tell, self._clock = rounds, tell, clock
        self._brought: list[TunedRule] = []
        self._left_out: dict[str, str] = {}
        self.best: CalibratedPolicy | None = None

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """Raises AerogelError for a network without routed experts or with a rule on, and for recorded calls."""
        shape_of(network)
        wanted = wanted_of(network, samples)
        on = [measured.step for measured in policies.load(network.origin) if isinstance(measured.step.method, ExpertSkippingPolicy)]
        if on:
            raise AerogelError(f"{network.origin} has {on[0].name} on already; give the model that it was made for")
        self._network, self._wanted = network, wanted

    def prepare(self, seed: int) -> dict[str, Any]:
        """Read twice as much as is asked for: one half is calibrated on, the other is for the judge."""
        calls, self._held_out, facts = halves(self._network, self._wanted, seed)
        self._seed = seed
        self._answers = Answers(self._network, calls, Vocabulary.of(self._network))
        return facts

    def bring(self) -> None:
        """Calibrate each policy for each share, the smallest first, as far as it goes."""
        total = len(self._tried) * len(self.ratios)
        for number, (name, (cls, options)) in enumerate(self._tried.items()):
            for place, ratio in enumerate(self.ratios):
                self._tell(Event("compress", number * len(self.ratios) + place, total, f"{name} at {ratio:.0%}"))
                if not self._bring(name, cls, {**options, "ratio": ratio}):
                    break

    def _bring(self, name: str, cls: type, options: dict[str, Any]) -> bool:
        """Calibrate a policy; whether it is worth while to ask for more."""
        asked, start = options["ratio"], self._clock()
        try:
            measured = self._calibrated(name, cls, options)
        except UnreachableError as error:
            self._leave_out(name, asked, f"it drops {error.most:.1%} of all token-expert assignments at most")
            measured = self._calibrated(name, cls, {**options, "ratio": math.floor(1000 * error.most) / 1000})
            self._add(TunedRule(asked, measured, self._clock() - start))
            return False
        except AerogelError as error:
            self._leave_out(name, asked, str(error))
            return False
        brought = TunedRule(asked, measured, self._clock() - start)
        if asked == self.budget and not brought.met:
            self._leave_out(name, asked, f"asked for {asked:.1%}, it drops {brought.dropped:.1%} of all token-expert assignments")
        self._add(brought)
        return True

    def _leave_out(self, name: str, asked: float, reason: str) -> None:
        """Say why a policy does not meet the budget; what fails beyond it has met it."""
        if asked <= self.budget:
            self._left_out[name] = reason

    def _add(self, brought: TunedRule) -> None:
        """Keep it for the judge, unless the policy dropped just as much before: it goes by whole experts, or has come to its end."""
        before = [one.dropped for one in self._brought if one.measured.step.name == brought.measured.step.name]
        if brought.dropped not in before:
            self._brought.append(brought)

    def _calibrated(self, name: str, cls: type, options: dict[str, Any]) -> CalibratedPolicy:
        step = Step(name, build(cls, options, f"policy {name!r}"))
        assert isinstance(step.method, ExpertSkippingPolicy)
        with seeded(self._seed):
            return CalibratedPolicy(step, step.method.calibrated_on(self._answers))

    def judge(self) -> dict[str, Any]:
        """Hold all that was calibrated against the model with all experts; return the facts, by policy and share."""
        total = len(self._brought) + 1
        self._tell(Event("evaluate", 0, total, "the model with all experts"))
        judge = SkipJudge(self._network, self._held_out, self._rounds, self._clock)
        rows = []
        for number, brought in enumerate(self._brought, 1):
            self._tell(Event("evaluate", number, total, f"{brought.measured.step.name} at {brought.asked:.0%}"))
            rows.append(_row(brought) | judge.policy(partial(policies.on, self._network, [brought.measured])))
        enough = [place for place, row in enumerate(rows) if row["asked"] == self.budget and row["met"] and math.isfinite(row["kl"])]
        if enough:
            self.best = self._brought[min(enough, key=lambda place: rows[place]["kl"])].measured
        shape = shape_of(self._network)
        return judge.conditions | {
            "budget": self.budget,
            "ratios": self.ratios,
            "moe": vars(shape),
            "rows": rows,
            "left_out": [{"policy": name, "reason": reason} for name, reason in self._left_out.items()],
        }


def _unfit(cls: type) -> str:
    return "" if issubclass(cls, ExpertSkippingPolicy) else "skips no experts by a rule, so there is nothing to choose"


def _share(budget: float | str) -> float:
    """The budget as a share; per cent are fine."""
    said = str(budget).strip()
    try:
        share = float(said.removesuffix("%")) / (100 if said.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise AerogelError(f"budget {budget!r} is no share of assignments to drop; give a number between 0 and 1, for example 0.67 or 67%")
    return share


def _row(brought: TunedRule) -> dict[str, Any]:
    step = brought.measured.step
    return {"policy": step.name, "asked": brought.asked, "met": brought.met, "step": step.as_dict(), "seconds": brought.seconds}
