"""The report of a search for a feature cache: every policy at one measured speed, in words and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import Field

from aerogel.io.record.measures import Png
from aerogel.io.record.schema import ModelRecord, Provenance
from aerogel.report import phrases
from aerogel.report.courses import Course, courses
from aerogel.report.page import NARROW, WIDE, Figure
from aerogel.report.policy_search import LeftOut, Part
from aerogel.report.reuse import work_map
from aerogel.report.tradeoff import Axis, Point, tradeoff

TEMPLATE = "cache_search.html"
SPEED = Axis("Times faster, measured", "search", "speedup", 1.0, "right", start=1.0)
ERROR = "Error of the final latents"

GLOSSARY = (
    ("Error", "Mean squared error of the latents against those of the model without a cache, from the same noise."),
    (
        "Times faster",
        "Seconds of a denoising run without the policy divided by seconds with it; the median over alternating rounds.",
    ),
    ("Fewer steps", "The same pipeline without a cache, with the most steps that are fast enough: the baseline for caching."),
    ("Cached", "Share of the work of all modules at all steps that is skipped."),
)


class Try(Part):
    """A setting that was timed."""

    value: float
    speedup: float


class Row(Part):
    """A policy that is fast enough, or the pipeline with fewer steps."""

    policy: str
    option: str
    value: float
    """Of the option that sets its speed."""
    speedup: float
    error: float
    seconds: float | None = None
    """To make it."""
    step_errors: list[float] = Field(default_factory=list)
    ran: list[list[float]] = Field(default_factory=list)
    """The share of each module's work that was computed at each step."""
    images: list[Png] = Field(default_factory=list)
    tries: list[Try] = Field(default_factory=list)

    @property
    def cached(self) -> float | None:
        """The share of all work that was skipped."""
        cells = [share for row in self.ran for share in row]
        return 1 - sum(cells) / len(cells) if cells else None


class Search(Part):
    """One search for a cache: the content of search.json."""

    model: ModelRecord
    budget: float
    sampler: str = ""
    steps: list[float]
    modules: list[str]
    guidance: float | None = None
    count: int
    batch: int
    rounds: int
    seconds: float | None = None
    """Of a turn without a policy."""
    variance: float
    rows: list[Row]
    """Best first."""
    fewer: Row | None = None
    without_fewer: str = ""
    left_out: list[LeftOut] = Field(default_factory=list)
    images: list[Png] = Field(default_factory=list)
    subjects: list[str] = Field(default_factory=list)
    provenance: Provenance = Provenance()
    timings: dict[str, float] = Field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        """The policy of the least error."""
        return next((row for row in self.rows if math.isfinite(row.error)), None)

    @property
    def ranked(self) -> list[Row]:
        """All rows, fewer steps among them, best first."""
        rows = [*self.rows, *([self.fewer] if self.fewer else [])]
        return sorted(rows, key=lambda row: (not math.isfinite(row.error), row.error))


class Line(NamedTuple):
    """A row in words."""

    policy: str
    setting: str
    speedup: str
    error: str
    times: str
    cached: str
    seconds: str
    best: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the columns of the terminal's table."""
        return self.policy, self.setting, self.speedup, self.error, self.times, self.seconds


class Strip(NamedTuple):
    """Images of one row of the grid."""

    name: str
    error: str
    images: Sequence[str]


def columns(found: Search) -> tuple[str, ...]:
    """Of the table that a terminal shows; the first two are words."""
    return "policy", "setting", "times faster", "error", "vs best", "calibration"


def lines(found: Search) -> Iterator[Line]:
    """Every row in words, best first."""
    best = found.best
    for row in found.ranked:
        yield Line(
            row.policy,
            f"{row.option} {row.value:g}",
            f"{row.speedup:.2f}",
            phrases.digits(row.error),
            phrases.times(row.error, best.error) if best and math.isfinite(row.error) else phrases.NONE,
            phrases.percent(row.cached),
            phrases.NONE if row.seconds is None else phrases.seconds(row.seconds),
            row is best,
        )


def headline(found: Search) -> str:
    """Say what was found, in one sentence."""
    best = found.best
    if best is None:
        return f"No policy makes {found.model.name} {found.budget:g} times faster."
    faster = f"{found.model.name} is {best.speedup:.2f} times faster with {best.policy}"
    return f"{faster}; the error of its final latents is {phrases.digits(best.error)}."


def lead(found: Search) -> str:
    """Say what stands beside the headline."""
    total = len(found.rows) + len(found.left_out)
    said = f"{len(found.rows)} of {total} {'policy' if total == 1 else 'policies'} reach {found.budget:g} times the speed."
    if found.fewer is None:
        return f"{said} Fewer steps do not: {found.without_fewer}."
    alone = f"Without a cache, {found.fewer.value:g} instead of {len(found.steps)} steps are {found.fewer.speedup:.2f} times faster"
    moved = f"their error is {phrases.digits(found.fewer.error)}"
    best = found.best
    if best is None or not best.error or not math.isfinite(found.fewer.error):
        return f"{said} {alone}; {moved}."
    share = found.fewer.error / best.error
    return f"{said} {alone}; {moved}, {phrases.digits(share)} times as large{'' if share >= 1 else ': no policy is better here'}."


def context(found: Search) -> dict[str, Any]:
    """Return what the template shows besides the parts of all searches."""
    best = found.best
    return {
        "title": f"{found.model.name} · feature caching at {found.budget:g}×",
        "frontier": Figure(frontier_chart(found, WIDE), frontier_chart(found, NARROW)) if found.rows or found.fewer else None,
        "lines": list(lines(found)),
        "conditions": _conditions(found),
        "best": best,
        "work": Figure(*(work_map(found.steps, found.modules, best.ran, width) for width in (WIDE, NARROW))) if best and best.ran else None,
        "courses": Figure(_courses(found, WIDE), _courses(found, NARROW)) if found.rows else None,
        "variance": phrases.digits(found.variance),
        "strips": list(_strips(found)),
        "subjects": found.subjects,
        "tries": [row for row in found.rows if row.tries],
    }


def frontier_chart(found: Search, width: float) -> Markup:
    points = {id(row): Point(_named(row), row.speedup, row.error, _role(found, row)) for row in found.ranked}
    drawable = [row for row in found.ranked if math.isfinite(row.error) and row.error > 0]
    undominated = [row for place, row in enumerate(drawable) if all(row.speedup > other.speedup for other in drawable[:place])]
    return tradeoff(list(points.values()), SPEED, ERROR, joined=[points[id(row)] for row in undominated], width=width, height=420)


def _role(found: Search, row: Row) -> Any:
    return "this" if row is found.best else "original" if row is found.fewer else "other"


def _named(row: Row) -> str:
    return f"{row.value:g} steps" if row.policy == "fewer steps" else row.policy


def _courses(found: Search, width: float) -> Markup:
    best = found.best
    drawn = [Course(row.policy, row.step_errors, row is best) for row in found.rows]
    drawn += [Course(_named(found.fewer), [found.fewer.error])] if found.fewer else []
    return courses(drawn, "Error after each step", width=width)


def _strips(found: Search) -> Iterator[Strip]:
    if found.images:
        yield Strip("no cache", "", found.images)
        yield from (Strip(_named(row), phrases.digits(row.error), row.images) for row in found.ranked)


def _conditions(found: Search) -> str:
    guidance = f" with guidance {found.guidance:g}" if found.guidance is not None else ""
    return (
        f"Errors over {found.count:,} images of held-out noise in {len(found.steps)} steps of {found.sampler}{guidance}. "
        f"Speed at batch {found.batch}, {found.rounds} rounds with and without each policy, alternating"
        f"{f'; {phrases.seconds(found.seconds)} per run without' if found.seconds else ''}."
    )
