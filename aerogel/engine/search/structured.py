"""The search for parts that can leave: of each structured method the least share that makes a forward so much faster, measured here.

Which channels leave does not change the speed of what is left. So shares of channels are tried on copies that are pruned by weights
alone, in turns with the model itself, and only the least one that is fast enough is pruned as asked for and judged on held-out data.
Its speed is measured once more: the time that chose a share is more often too good than too bad.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, ClassVar

from aerogel.engine.progress import Event, Tell
from aerogel.engine.run import compress
from aerogel.engine.search.candidates import chosen
from aerogel.engine.search.copy_search import CopySearch
from aerogel.engine.search.judging_copies import copy_of
from aerogel.errors import AerogelError
from aerogel.kernels.synchronized_clock import now
from aerogel.layers.slots import slots
from aerogel.methods.structured.policy import StructuredMethod
from aerogel.model.network import Network
from aerogel.recipe import Recipe, Step, build

BUDGET = "1.2x"
_NEAR = 0.98
"""A speed is enough from this share of the budget on, since measured times tremble."""
_OURS = ("share", "count")
"""Options that the budget decides."""


def speed_of(budget: float | str) -> float:
    """Return the speed-up that a budget such as 1.2x asks for; raises AerogelError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)x", str(budget).strip())
    if not found or not 1 < float(found[1]) <= 1000:
        raise AerogelError(f"budget {budget!r} is no speed-up of a forward; give how many times as fast it has to be, such as 1.2x")
    return float(found[1])


class StructuredSearch(CopySearch):
    """A search on its way."""

    task: ClassVar[str] = "structured"

    def __init__(
        self, budget: float | str | None, only: Sequence[str], overrides: Iterable[str], rounds: int, tell: Tell, clock: Callable[[], float]
    ) -> None:
        """Raises AerogelError for a budget that is no speed-up, and for methods of another kind."""
        super().__init__(tell, clock)
        self._budget = speed_of(BUDGET if budget is None else budget)
        self._tried = chosen(_unfit, only, overrides)
        for name, (_, options) in self._tried.items():
            if ours := [option for option in _OURS if option in options]:
                raise AerogelError(f"{name}.{ours[0]} is what the budget says here; leave it out")
        self._rounds = rounds
        self._seconds: list[float] = []
        self.best: Recipe | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """Return the budget, and the methods with their options."""
        return {"budget": self._budget, "methods": {name: options for name, (_, options) in self._tried.items()}}

    def bring(self) -> None:
        """Bring every method to the speed, and judge what is left."""
        for number, (name, (cls, options)) in enumerate(self._tried.items()):
            at = Event("compress", number, len(self._tried), name)
            self._tell(at)
            found = self._kept.get(name)
            if found is None:
                found = self._kept.add(name, self._brought(name, cls, options, at))
            if "reason" in found:
                self._left_out[name] = found["reason"]
            else:
                self._rows.append(found)

    def judge(self) -> dict[str, Any]:
        """Return the facts, best first, and set `best` to the recipe that moves the model least of those that are fast enough."""
        figure = self._judge.figure
        rows = sorted(self._rows, key=lambda row: (not row["met"], not math.isfinite(row[figure]), row[figure]))
        if rows and rows[0]["met"] and math.isfinite(rows[0][figure]):
            self.best = Recipe.parse({"name": f"{rows[0]['name']} at {self._budget:g}x", "steps": rows[0]["steps"]})
        return self._judge.conditions | {
            "budget": f"{self._budget:g}x",
            "figure": figure,
            "rounds": self._rounds,
            "forward_seconds": median(self._seconds) if self._seconds else None,
            "rows": rows,
            "left_out": [{"policy": name, "reason": reason} for name, reason in self._left_out.items()],
        }

    def _brought(self, name: str, cls: type[StructuredMethod], options: Mapping[str, Any], at: Event) -> dict[str, Any]:
        """Find the least share that is fast enough, prune as asked for and judge; the reason where a method refuses the model."""
        start = self._clock()
        try:
            method: StructuredMethod = build(cls, options, f"method {name!r}")
            tried: list[dict[str, float]] = []
            step = Step(name, self._weakest(name, method.strengths(self._network), tried))
            pruned = self._pruned(step, partial(self._inside, at))
            seconds = self._clock() - start
            fast, figures = self._speedup(pruned), self._judge.measure(pruned)
        except AerogelError as error:
            said = str(error).removeprefix(f"recipe {name!r}: ").removeprefix(f"{name}: ")
            return {"reason": said.removesuffix("; leave this step out")}
        left = _parameters(pruned) / _parameters(self._network)
        about = {"name": name, "steps": [step.as_dict()], "speedup": fast, "met": fast >= _NEAR * self._budget, "parameters": left}
        about["tried"] = tried
        return about | figures | {"seconds": seconds}

    def _weakest(self, name: str, strengths: Sequence[StructuredMethod], tried: list[dict[str, float]]) -> StructuredMethod:
        """Halve the strengths that are left, towards the weakest that is fast enough; raises AerogelError where none is."""
        if not strengths:
            raise AerogelError("the model has so few parts of this kind that none can leave")
        low, high = 0, len(strengths)
        while low < high:
            middle = (low + high) // 2
            copy = self._pruned(Step(name, strengths[middle].without_calibration()))
            tried.append({"parameters": _parameters(copy) / _parameters(self._network), "speedup": self._speedup(copy)})
            if tried[-1]["speedup"] >= _NEAR * self._budget:
                high = middle
            else:
                low = middle + 1
        if low == len(strengths):
            raise AerogelError(
                f"with as much removed as can be, {1 - tried[-1]['parameters']:.0%} of the parameters, a forward is "
                f"{tried[-1]['speedup']:.2f} times as fast"
            )
        return strengths[low]

    def _pruned(self, step: Step, tell: Tell = lambda event: None) -> Network:
        """Return a pruned copy of the model."""
        copy = copy_of(self._network)
        recipe = Recipe(step.name, (step,))
        compress(copy, recipe, samples=self._calibration.calls, measures=(), seed=self._seed, tell=tell)
        return copy

    def _speedup(self, copy: Network) -> float:
        """How many times as fast a copy reads the first call: the median of rounds in turns, after one that does not count."""
        ratios = []
        for _ in range(self._rounds + 1):
            self._seconds.append(self._forward(self._network))
            ratios.append(self._seconds[-1] / self._forward(copy))
        return median(ratios[1:])

    def _forward(self, network: Network) -> float:
        call = self._calibration.calls[0]
        start = now(network.device, self._clock)
        network.run(call)
        return now(network.device, self._clock) - start


def _unfit(cls: type) -> str:
    return "" if issubclass(cls, StructuredMethod) else "removes no parts of a model, so what is left is no faster by itself"


def _parameters(network: Network) -> int:
    return sum(slot.tensor.numel() for slot in slots(network.module))
