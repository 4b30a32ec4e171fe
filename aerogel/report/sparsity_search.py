"""The report of a search for zeros: every recipe at one budget, in words and figures, and the zeros of each layer in the best one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from aerogel.report import copy_search, phrases
from aerogel.report.copy_search import CopyRow, CopySearch, beside, cost, figures, headings, judged_on, moved, ranking
from aerogel.report.layers import zeros, zeros_map
from aerogel.report.page import NARROW, WIDE, Figure
from aerogel.report.policy_search import Part

TEMPLATE = "sparsity_search.html"
GLOSSARY = (
    ("Zeros", "Share of the weights of the prunable layers that are zero. Embeddings, the head and layers around the blocks stay dense."),
    *copy_search.GLOSSARY,
    ("Criterion", "Says which weights of a layer become zero."),
    ("Allocation", "Says which share of each layer becomes zero, so that the share of all layers is the budget."),
)


class Row(CopyRow):
    """A recipe with what it costs."""

    stage: str
    zeros: float
    met: bool
    layers: dict[str, float]
    """Share of zeros of each layer."""


class Stage(Part):
    """A stage of the search."""

    name: str
    about: str
    tried: list[str]


class PrunedLayer(Part):
    """A layer that every recipe prunes."""

    block: str
    weights: int


class Search(CopySearch):
    """One search for zeros: the content of search.json."""

    share: float
    pattern: str
    layers: dict[str, PrunedLayer]
    stages: list[Stage]
    rows: list[Row]
    """Those that meet the budget come first, the best before the others."""

    @property
    def best(self) -> Row | None:
        """The recipe that moves the model least of those that meet the budget."""
        return next((row for row in self.rows if row.met and math.isfinite(moved(self, row))), None)


class Line(NamedTuple):
    """A row in words."""

    name: str
    stage: str
    zeros: str
    figures: tuple[str, ...]
    seconds: str
    best: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the columns of the terminal's table."""
        return self.name, self.zeros, *self.figures


def columns(found: Search) -> tuple[str, ...]:
    """Of the table that a terminal shows; the first two are words."""
    return "recipe", "zeros", *headings(found)


def lines(found: Search) -> Iterator[Line]:
    """Every row in words, in the order of the record."""
    for row in found.rows:
        took = phrases.NONE if row.seconds is None else phrases.seconds(row.seconds)
        zero = f"{phrases.percent(row.zeros)}{'' if row.met else ', less'}"
        yield Line(row.name, row.stage, zero, figures(found, row), took, row is found.best)


def _asked(found: Search) -> str:
    share = phrases.percent(found.share)
    return share if found.pattern == "unstructured" else f"{share} in the pattern {found.pattern}"


def headline(found: Search) -> str:
    """Say what was found, in one sentence."""
    best = found.best
    if best is None:
        return f"No recipe prunes {_asked(found)} of the weights of {found.model.name}."
    return f"{found.model.name} loses {_asked(found)} of its prunable weights with {best.name}; {cost(found, best)}."


def lead(found: Search) -> str:
    """Say what stands beside the headline."""
    best = found.best
    said = f"{sum(row.met for row in found.rows)} of {len(found.rows)} recipes meet the budget."
    return said if best is None else f"{said}{beside(found, best)}"


def context(found: Search) -> dict[str, Any]:
    """Return what the template shows besides the parts of all searches."""
    best = found.best
    blocks = {name: layer.block for name, layer in found.layers.items()}
    tables = zeros(best.layers, blocks) if best else {}
    drawn = [row for row in found.rows if math.isfinite(moved(found, row))]
    return {
        "title": f"{found.model.name} · {_asked(found)} zeros",
        "conditions": _conditions(found),
        "stages": found.stages,
        "headings": headings(found),
        "lines": list(lines(found)),
        "best": best,
        "figure": found.figure,
        "ranking": Figure(ranking(found, drawn, best, WIDE), ranking(found, drawn, best, NARROW)) if drawn else None,
        "maps": {tower: Figure(zeros_map(table, WIDE), zeros_map(table, NARROW, tall=True)) for tower, table in tables.items()},
    }


def _conditions(found: Search) -> str:
    layers, weights = len(found.layers), sum(layer.weights for layer in found.layers.values())
    whole = f" of {phrases.number(found.model.parameters)} parameters" if found.model.parameters else ""
    return f"Pruned are {layers} layers with {phrases.number(weights)} weights{whole}. Judged on {judged_on(found)}."
