"""The report of a search for parts that can leave: every method at one measured speed, in words and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import model_validator

from aerogel.report import copy_search, phrases
from aerogel.report.copy_search import CopyRow, CopySearch, beside, cost, figures, headings, judged_on, moved, ranking
from aerogel.report.courses import Course, courses
from aerogel.report.page import NARROW, WIDE, Figure
from aerogel.report.policy_search import Part

TEMPLATE = "structured_search.html"
GLOSSARY = (
    ("Forward", "One run of the whole model over the first call of the calibration data."),
    ("Speed-up", "Seconds of a forward of the original model divided by those of the model without these parts, in turns on one machine."),
    *copy_search.GLOSSARY,
)


class Tried(Part):
    """A model with parts removed that was timed."""

    parameters: float
    """Share of the original's parameters that it has."""
    speedup: float


class Row(CopyRow):
    """A method at the least share that is fast enough, with what it costs."""

    speedup: float
    parameters: float
    tried: list[Tried]

    @model_validator(mode="after")
    def _has_its_step(self) -> Row:
        if not self.steps or self.name not in self.steps[0]:
            raise ValueError(f"steps: the first is to be {self.name}")
        return self


class Search(CopySearch):
    """One search for parts that can leave: the content of search.json."""

    rounds: int
    forward_seconds: float | None = None
    """Of the original model."""
    rows: list[Row]
    """The best first."""

    @property
    def best(self) -> Row | None:
        """The method that moves the model least of those that are fast enough."""
        return next((row for row in self.rows if row.met and math.isfinite(moved(self, row))), None)


class Line(NamedTuple):
    """A row in words."""

    name: str
    options: str
    speedup: str
    parameters: str
    figures: tuple[str, ...]
    seconds: str
    best: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the columns of the terminal's table."""
        return self.name, self.options, self.speedup, self.parameters, *self.figures


def columns(found: Search) -> tuple[str, ...]:
    """Of the table that a terminal shows; the first two are words."""
    return "method", "removed", "speed-up", "parameters", *headings(found)


def lines(found: Search) -> Iterator[Line]:
    """Every row in words, in the order of the record."""
    for row in found.rows:
        took = phrases.NONE if row.seconds is None else phrases.seconds(row.seconds)
        fast, left = f"{row.speedup:.2f}x{'' if row.met else ', less'}", phrases.percent(row.parameters)
        yield Line(row.name, _removed(row), fast, left, figures(found, row), took, row is found.best)


def _removed(row: Row) -> str:
    """Say how much leaves, as the recipe does."""
    options = row.steps[0][row.name]
    count, share = options.get("count"), options.get("share")
    return f"{count} layers" if isinstance(count, int) else phrases.percent(share) if isinstance(share, float) else phrases.NONE


def headline(found: Search) -> str:
    """Say what was found, in one sentence."""
    best = found.best
    if best is None:
        return f"No structured method makes a forward of {found.model.name} about {_times(found)} as fast."
    return f"A forward of {found.model.name} is {best.speedup:.2f} times as fast with {best.name}; {cost(found, best)}."


def lead(found: Search) -> str:
    """Say what stands beside the headline."""
    methods = len(found.rows) + len(found.left_out)
    said = f"{sum(row.met for row in found.rows)} of {methods} {'method' if methods == 1 else 'methods'} can"
    said += f" make it {_times(found)} as fast, or miss that by at most 2 %."
    best = found.best
    return said if best is None else f"{said} {phrases.percent(best.parameters)} of the parameters stay.{beside(found, best)}"


def _times(found: Search) -> str:
    return f"{found.budget.removesuffix('x')} times"


def context(found: Search) -> dict[str, Any]:
    """Return what the template shows besides the parts of all searches."""
    best = found.best
    drawn = [row for row in found.rows if math.isfinite(moved(found, row))]
    return {
        "title": f"{found.model.name} · {_times(found)} as fast",
        "conditions": _conditions(found),
        "headings": headings(found),
        "lines": list(lines(found)),
        "figure": found.figure,
        "ranking": Figure(ranking(found, drawn, best, WIDE), ranking(found, drawn, best, NARROW)) if drawn else None,
        "speeds": Figure(speeds(found, WIDE), speeds(found, NARROW)) if found.rows else None,
    }


def speeds(found: Search, width: float) -> Markup:
    """Draw a line for each method: how fast forwards are over the share of parameters that left."""
    drawn = []
    for row in found.rows:
        tried = sorted({(1 - one.parameters, one.speedup) for one in row.tried} | {(0.0, 1.0)})
        drawn.append(Course(row.name, [y for _, y in tried], best=row is found.best, at=[x for x, _ in tried]))
    return courses(drawn, "Speed-up of a forward", across="Share of the parameters that left", rising=True, log=False, width=width)


def _conditions(found: Search) -> str:
    whole = "" if found.forward_seconds is None else f"; {phrases.seconds(found.forward_seconds)} for the original"
    return f"Speed: {found.rounds} rounds in turns with the original{whole}. Judged on {judged_on(found)}."
