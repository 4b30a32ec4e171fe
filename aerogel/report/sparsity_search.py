"""The report of a search for zeros: every recipe at one budget, in words and figures, and the zeros of each layer in the best one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from markupsafe import Markup
from pydantic import Field

from aerogel.io.record.schema import ModelRecord, Provenance
from aerogel.report import phrases
from aerogel.report.layers import zeros, zeros_map
from aerogel.report.page import NARROW, WIDE, Figure
from aerogel.report.policy_search import KL, SAME_TOKEN, LeftOut, Part
from aerogel.report.svg import element, image, label

TEMPLATE = "sparsity_search.html"
GLOSSARY = (
    ("Zeros", "Share of the weights of the prunable layers that are zero. Embeddings, the head and layers around the blocks stay dense."),
    KL,
    SAME_TOKEN,
    ("Perplexity", "The exponential of the mean negative log-likelihood per token of the held-out data. Lower is better."),
    ("Error", "Squared norm of what the output moves by, divided by the squared norm of the original's output, on held-out inputs."),
    ("Same class", "Share of held-out samples for which both have the same most likely class."),
    ("Criterion", "Says which weights of a layer become zero."),
    ("Allocation", "Says which share of each layer becomes zero, so that the share of all layers is the budget."),
)
_PITCH, _ROOM = 22.0, 500.0


class Row(Part):
    """A recipe with what it costs."""

    name: str
    stage: str
    steps: list[dict[str, Any]]
    zeros: float
    met: bool
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    error: float | None = None
    seconds: float | None = None
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


class Search(Part):
    """One search for zeros: the content of search.json."""

    model: ModelRecord
    budget: str
    share: float
    pattern: str
    figure: Literal["kl", "error"]
    """Field of the rows that they are ranked by."""
    judged: Literal["predictions", "classes", "outputs"]
    count: int
    """Sequences, images or samples that recipes were judged on."""
    tokens: int | None = None
    calls: int | None = None
    perplexity: float | None = None
    """Of the original model."""
    layers: dict[str, PrunedLayer]
    stages: list[Stage]
    rows: list[Row]
    """Those that meet the budget come first, the best before the others."""
    left_out: list[LeftOut] = Field(default_factory=list)
    provenance: Provenance = Provenance()
    timings: dict[str, float] = Field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        """The recipe that moves the model least of those that meet the budget."""
        return next((row for row in self.rows if row.met and math.isfinite(self.moved(row))), None)

    def moved(self, row: Row) -> float:
        """Return how far a recipe moves the model."""
        found = row.kl if self.figure == "kl" else row.error
        return math.inf if found is None else found


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


def _figures(found: Search) -> tuple[str, ...]:
    """Headings of what the judge measured."""
    return {"predictions": ("KL", "same token", "perplexity"), "classes": ("error", "same class"), "outputs": ("error",)}[found.judged]


def columns(found: Search) -> tuple[str, ...]:
    """Of the table that a terminal shows; the first two are words."""
    return "recipe", "zeros", *_figures(found)


def lines(found: Search) -> Iterator[Line]:
    """Every row in words, in the order of the record."""
    for row in found.rows:
        by_heading = {
            "KL": phrases.digits(row.kl),
            "same token": phrases.percent(row.top1),
            "same class": phrases.percent(row.top1),
            "perplexity": phrases.digits(row.perplexity),
            "error": phrases.percent(row.error),
        }
        took = phrases.NONE if row.seconds is None else phrases.seconds(row.seconds)
        zero = f"{phrases.percent(row.zeros)}{'' if row.met else ', less'}"
        yield Line(row.name, row.stage, zero, tuple(by_heading[each] for each in _figures(found)), took, row is found.best)


def _asked(found: Search) -> str:
    share = phrases.percent(found.share)
    return share if found.pattern == "unstructured" else f"{share} in the pattern {found.pattern}"


def headline(found: Search) -> str:
    """Say what was found, in one sentence."""
    best = found.best
    if best is None:
        return f"No recipe prunes {_asked(found)} of the weights of {found.model.name}."
    if found.figure == "kl":
        cost = f"the KL divergence is {phrases.digits(best.kl)} nats per token"
    else:
        cost = f"the relative error of its output is {phrases.percent(best.error)}"
    return f"{found.model.name} loses {_asked(found)} of its prunable weights with {best.name}; {cost}."


def lead(found: Search) -> str:
    """Say what stands beside the headline."""
    best = found.best
    said = f"{sum(row.met for row in found.rows)} of {len(found.rows)} recipes meet the budget."
    if best is None:
        return said
    if best.perplexity is not None:
        return f"{said} Perplexity goes from {phrases.digits(found.perplexity)} to {phrases.digits(best.perplexity)}."
    same = f" The most likely class is the same for {phrases.percent(best.top1)} of the samples." if best.top1 is not None else ""
    return f"{said}{same}"


def context(found: Search) -> dict[str, Any]:
    """Return what the template shows besides the parts of all searches."""
    best = found.best
    blocks = {name: layer.block for name, layer in found.layers.items()}
    tables = zeros(best.layers, blocks) if best else {}
    drawn = [row for row in found.rows if math.isfinite(found.moved(row))]
    return {
        "title": f"{found.model.name} · {_asked(found)} zeros",
        "conditions": _conditions(found),
        "stages": found.stages,
        "headings": _figures(found),
        "lines": list(lines(found)),
        "best": best,
        "figure": found.figure,
        "ranking": Figure(ranking(found, drawn, WIDE), ranking(found, drawn, NARROW)) if drawn else None,
        "maps": {tower: Figure(zeros_map(table, WIDE), zeros_map(table, NARROW, tall=True)) for tower, table in tables.items()},
    }


def ranking(found: Search, rows: list[Row], width: float) -> Markup:
    """Draw a bar for each recipe, as long as it moves the model; where there is little room, names stand above their bars."""
    longest, above = max(found.moved(row) for row in rows) or 1.0, width < _ROOM
    left = 0.0 if above else 12 + 6.9 * max(len(row.name) for row in rows)
    pitch, down = (2 * _PITCH - 6, _PITCH - 5) if above else (_PITCH, 0.0)
    scale = (width - left - 70) / longest
    drawn = []
    for number, row in enumerate(rows):
        y, moved, best = number * pitch, found.moved(row), row is found.best
        style = "strong" if best else "small"
        words = phrases.digits(moved) if found.figure == "kl" else phrases.percent(moved)
        long, told = max(1.0, moved * scale), element("title", f"{row.name}: {words}")
        drawn += [
            label(max(left - 10, 0), y + 15, row.name, style, "start" if above else "end"),
            element("rect", told, x=left, y=y + down + 5, width=long, height=12, rx=2, class_=_shade(row, best)),
            label(left + long + 7, y + down + 15, words, style),
        ]
    return image(width, len(rows) * pitch + 4, "Cost of every recipe", *drawn)


def _shade(row: Row, best: bool) -> str:
    return "part-1" if best else "part-2" if row.met else "part-4"


def _conditions(found: Search) -> str:
    layers, weights = len(found.layers), sum(layer.weights for layer in found.layers.values())
    whole = f" of {phrases.number(found.model.parameters)} parameters" if found.model.parameters else ""
    judged = f"{found.count:,} samples held out of calibration"
    if found.judged == "predictions":
        judged = f"{found.count:,} sequences held out of calibration, {found.tokens or 0:,} tokens"
    elif found.judged == "outputs":
        judged = f"{found.calls or 0:,} calls held out of calibration, {found.count:,} samples"
    return f"Pruned are {layers} layers with {phrases.number(weights)} weights{whole}. Judged on {judged}."
