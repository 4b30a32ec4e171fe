"""The search for zeros: criteria, then shares of layers, then adjustments, each compressed from a fresh copy and judged on held-out data.

Three stages take the place of the whole product: every criterion with one share for all layers, every allocation with the best two
criteria, and every adjustment behind the best two recipes so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from aerogel.engine.calibration import CalibrationInput
from aerogel.engine.progress import Event, Tell
from aerogel.engine.run import compress
from aerogel.engine.search.copy_search import CopySearch
from aerogel.engine.search.judging_copies import copy_of
from aerogel.engine.search.pruning_recipes import Budget, Candidate, Prunable, Recipes
from aerogel.errors import AerogelError
from aerogel.model.network import Network
from aerogel.recipe import Recipe

BUDGET = 0.5
_SHORT = 0.005
"""A recipe meets a share that it misses by no more than this: criteria that compare the weights of one output round their number down."""
_BEST = 2
"""Recipes that a stage goes on from."""


class SparsitySearch(CopySearch):
    """A search on its way."""

    task: ClassVar[str] = "sparsity"

    def __init__(
        self, budget: float | str | None, only: Sequence[str], overrides: Iterable[str], rounds: int, tell: Tell, clock: Callable[[], float]
    ) -> None:
        """Raises AerogelError for a budget that says nothing about zeros, and for methods of another kind."""
        super().__init__(tell, clock)
        self.budget = Budget.of(BUDGET if budget is None else budget)
        self._methods = Recipes(only, overrides)
        self._left_out |= self._methods.left_out
        self._stages: list[dict[str, Any]] = []
        self.best: Recipe | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """Return the budget, and the methods with their options."""
        return {"budget": self.budget.said, "methods": self._methods.options}

    def check(self, network: Network, samples: CalibrationInput | None) -> None:
        """Raises AerogelError for a network in which there is nothing to prune, and for a budget that it cannot meet."""
        super().check(network, samples)
        self._prunable = Prunable.of(network, self.budget.run)
        self._share = self.budget.share_of(self._prunable, network.stored_dtype)

    def bring(self) -> None:
        """Compress and judge the candidates, stage after stage."""
        methods, pattern = self._methods, self.budget.pattern != "unstructured"
        with_pattern = f" in the pattern {self.budget.pattern}" if pattern else ""
        self._stage("criteria", f"every criterion{with_pattern}, the same share in each layer", list(self._criteria()))
        if pattern:
            self._left_out |= dict.fromkeys(methods.allocations, f"in the pattern {self.budget.pattern} every layer has the same share")
        else:
            first = [row["criterion"] for row in self._ranked()[:_BEST]]
            about = f"shares that differ between layers, with the best criteria: {', '.join(first)}"
            self._stage("allocations", about, [Candidate(one, rule) for rule in methods.allocations for one in first])
        leading = [Candidate(row["criterion"], row["allocation"]) for row in self._ranked()[:_BEST]]
        about = f"weights and biases adjusted behind the best recipes so far: {', '.join(one.name for one in leading)}"
        self._stage(
            "reconstructions", about, [one._replace(reconstruction=behind) for behind in methods.reconstructions for one in leading]
        )

    def judge(self) -> dict[str, Any]:
        """Return the facts, best first, and set `best` to the recipe that moves the model least of those that meet the budget."""
        ranked = self._ranked()
        if ranked:
            self.best = Recipe.parse({"name": f"{ranked[0]['name']} at {self.budget.said}", "steps": ranked[0]["steps"]})
        missed = [row for row in self._rows if row not in ranked]
        return self._judge.conditions | {
            "budget": self.budget.said,
            "share": self._share,
            "pattern": self.budget.pattern,
            "figure": self._judge.figure,
            "layers": {name: {"block": self._prunable.blocks[name], "weights": size} for name, size in self._prunable.sizes.items()},
            "stages": self._stages,
            "rows": [*ranked, *missed],
            "left_out": [{"policy": name, "reason": reason} for name, reason in self._left_out.items()],
        }

    def _criteria(self) -> Iterator[Candidate]:
        """The criteria that can act on every layer that is to be pruned; the others are left out."""
        for name in self._methods.criteria:
            found = self._methods.reach(name, self._prunable, self._network)
            if found == set(self._prunable.layers):
                yield Candidate(name)
                continue
            part = sum(self._prunable.sizes[layer] for layer in found) / self._prunable.weights
            self._left_out[name] = (
                f"it can act on {len(found)} of the {len(self._prunable.layers)} layers ({part:.1%} of their weights), "
                "so its zeros would be another budget"
            )

    def _stage(self, name: str, about: str, candidates: Sequence[Candidate]) -> None:
        """Try candidates and note what the stage was about; one without candidates is not there."""
        for number, candidate in enumerate(candidates):
            at = Event("compress", number, len(candidates), f"{name}: {candidate.name}")
            self._tell(at)
            found = self._kept.get(candidate.name)
            if found is None:
                found = self._kept.add(candidate.name, self._tried(candidate, name, at))
            if "reason" in found:
                self._left_out[candidate.name] = found["reason"]
            else:
                self._rows.append(found)
        if candidates:
            self._stages.append({"name": name, "about": about, "tried": [one.name for one in candidates]})

    def _tried(self, candidate: Candidate, stage: str, at: Event) -> dict[str, Any]:
        """Compress a copy and judge it; the reason where a method refuses the model."""
        start = self._clock()
        try:
            recipe = self._methods.recipe(candidate, self.budget, self._share, self._prunable)
            pruned = copy_of(self._network)
            compress(pruned, recipe, samples=self._calibration.calls, measures=(), seed=self._seed, tell=partial(self._inside, at))
            seconds = self._clock() - start
            figures = self._judge.measure(pruned)
        except AerogelError as error:
            return {"reason": str(error).removeprefix(f"recipe {candidate.name + ' at ' + self.budget.said!r}: ")}
        layers = self._prunable.zeros(pruned)
        zeros = self._prunable.mean(layers)
        return {
            "name": candidate.name,
            **candidate._asdict(),
            "stage": stage,
            "steps": [step.as_dict() for step in recipe.steps],
            "zeros": zeros,
            "met": zeros >= self._share - _SHORT,
            **figures,
            "seconds": seconds,
            "layers": layers,
        }

    def _ranked(self) -> list[dict[str, Any]]:
        """The rows that meet the budget, best first."""
        figure = self._judge.figure
        return sorted((row for row in self._rows if row["met"] and math.isfinite(row[figure])), key=lambda row: _place(row, figure))


def _place(row: Mapping[str, Any], figure: str) -> tuple[float, int]:
    """Key that puts rows in order: the figure, and of equal ones the shorter recipe."""
    return float(row[figure]), len(row["steps"])
