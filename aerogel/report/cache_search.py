"""What a search for a cache found, in words and figures: every policy at one measured speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from aerogel.report import phrases
from aerogel.report.courses import Course, courses
from aerogel.report.page import NARROW, WIDE, Figure
from aerogel.report.record import Model, Png
from aerogel.report.reuse import work_map
from aerogel.report.tradeoff import Axis, Point, tradeoff

TEMPLATE = "cache_search.html"
SPEED = Axis("Times faster, measured", "search", "speedup", 1.0, "right", start=1.0)
ERROR = "Error of the final latents"

GLOSSARY = (
    ("Error", "Mean squared distance of latents from those that the network makes of the same noise when all of it runs at every step."),
    ("Times faster", "Seconds of a whole denoising without the policy over seconds with it, in turns; the median of the rounds' ratios."),
    ("Fewer steps", "The same pipeline without a policy, with the most steps that are fast enough: what reuse has to be better than."),
    ("Reused", "Share of the work of all parts at all steps that is not done."),
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Try(_Part):
    """A setting that was timed."""

    value: float
    speedup: float


class Row(_Part):
    """A policy that is fast enough, or the pipeline with fewer steps."""

    policy: str
    option: str
    value: float
    """Of the option that sets its speed."""
    speedup: float
    error: float
    seconds: float | None = None
    """To make it."""
    step_errors: list[float] = []
    ran: list[list[float]] = []
    """The share of each unit's work that was done at each step."""
    images: list[Png] = []
    tries: list[Try] = []

    @property
    def reused(self) -> float | None:
        """The share of all work that was not done."""
        cells = [share for row in self.ran for share in row]
        return 1 - sum(cells) / len(cells) if cells else None


class LeftOut(_Part):
    """A policy that is not fast enough, or refuses the network."""

    policy: str
    reason: str


class Search(_Part):
    """One search for a cache: the content of search.json."""

    model: Model
    budget: float
    sampler: str = ""
    steps: list[float]
    units: list[str]
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
    left_out: list[LeftOut] = []
    images: list[Png] = []
    subjects: list[str] = []
    provenance: dict[str, Any] = {}
    timings: dict[str, float] = {}

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
    reused: str
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
    return "policy", "set to", "times faster", "error", "of the best", "to make"


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
            phrases.percent(row.reused),
            phrases.NONE if row.seconds is None else phrases.seconds(row.seconds),
            row is best,
        )


def headline(found: Search) -> str:
    """What was found, in one sentence."""
    best = found.best
    if best is None:
        return f"No policy makes {found.model.name} {found.budget:g} times as fast."
    faster = f"{found.model.name} denoises {best.speedup:.2f} times as fast with {best.policy}"
    return f"{faster}; its final latents move by {phrases.digits(best.error)}."


def lead(found: Search) -> str:
    """What stands beside it."""
    total = len(found.rows) + len(found.left_out)
    said = f"{len(found.rows)} of {total} {'policy' if total == 1 else 'policies'} can be {found.budget:g} times as fast."
    if found.fewer is None:
        return f"{said} The pipeline alone cannot: {found.without_fewer}."
    alone = f"The pipeline alone is {found.fewer.speedup:.2f} times as fast in {found.fewer.value:g} of {len(found.steps)} steps"
    moved = f"moves by {phrases.digits(found.fewer.error)}"
    best = found.best
    if best is None or not best.error or not math.isfinite(found.fewer.error):
        return f"{said} {alone} and {moved}."
    share = found.fewer.error / best.error
    return f"{said} {alone} and {moved}, {phrases.digits(share)} times as much{'' if share >= 1 else ': no policy is worth it here'}."


def context(found: Search) -> dict[str, Any]:
    """What the template shows beside what all searches have."""
    best = found.best
    return {
        "title": f"{found.model.name} · a cache for {found.budget:g}×",
        "frontier": Figure(frontier_chart(found, WIDE), frontier_chart(found, NARROW)) if found.rows or found.fewer else None,
        "lines": list(lines(found)),
        "conditions": _conditions(found),
        "best": best,
        "work": Figure(*(work_map(found.steps, found.units, best.ran, width) for width in (WIDE, NARROW))) if best and best.ran else None,
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
    return courses(drawn, "Error behind each step", width=width)


def _strips(found: Search) -> Iterator[Strip]:
    if found.images:
        yield Strip("all of it, every step", "", found.images)
        yield from (Strip(_named(row), phrases.digits(row.error), row.images) for row in found.ranked)


def _conditions(found: Search) -> str:
    guidance = f" under guidance {found.guidance:g}" if found.guidance is not None else ""
    return (
        f"Errors are of {found.count:,} images of held-out noise in {len(found.steps)} steps of {found.sampler}{guidance}. "
        f"Speed is of {found.batch} images at once, {found.rounds} rounds with and without each policy in turns"
        f"{f', {phrases.seconds(found.seconds)} a turn without' if found.seconds else ''}."
    )
