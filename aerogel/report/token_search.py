"""The report of a search for a policy that drops tokens: every policy at one budget, in words and in a figure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import Field

from aerogel.report import phrases, policy_search
from aerogel.report.page import NARROW, WIDE, Figure
from aerogel.report.policy_search import (
    Judged,
    JudgedRow,
    JudgedSearch,
    Part,
    answers_match,
    counted,
    judged_on,
    rank,
    right_answers,
    speed_conditions,
    speeds,
)
from aerogel.report.svg import element, image
from aerogel.report.tradeoff import Axis, Point, tradeoff

SPEED = Axis("Prefill, times faster", "speed", "prefill", 1.0, "right")
SIDE = 200.0
"""Width of an image."""
TEMPLATE = "token_search.html"
GLOSSARY = (
    ("Computed", "Share of the tokens that a policy may drop which is computed, on average over the decoder's blocks."),
    *policy_search.GLOSSARY,
    policy_search.NUMBERS_FOUND,
)


class Row(JudgedRow):
    """A policy at the weakest strength that meets the budget."""

    kept: float


class Picture(Part):
    """An image, and the tokens of it that the best policy leaves to the decoder's last block."""

    question: str
    png: str
    """The image in base64."""
    rows: int
    columns: int
    kept: list[int]
    """Numbers of its tokens, row by row."""


class Search(JudgedSearch):
    """One search for a policy that drops tokens: the content of search.json."""

    budget: str
    rows: list[Row]
    pictures: list[Picture] = Field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The policy of the lowest KL divergence, of those that find most where numbers were hidden."""
        return min((row for row in self.rows if math.isfinite(row.kl)), key=lambda row: rank(self, row), default=None)


class Line(NamedTuple):
    """A row in words."""

    policy: str
    computed: str
    judged: Judged
    best: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """Under the columns of the terminal's table."""
        judged = self.judged
        return self.policy, self.computed, judged.kl, judged.right, judged.prefill, judged.decode


def columns(found: Search) -> tuple[str, ...]:
    """Of the table that a terminal shows; the first two are words."""
    return "policy", "computed", "KL", right_answers(found).lower(), "prefill", "decode"


def lines(found: Search) -> Iterator[Line]:
    """Every row in words, the best first."""
    for row in sorted(found.rows, key=lambda row: rank(found, row)):
        yield Line(row.policy, phrases.percent(row.kept), Judged.of(row), row is found.best)


def headline(found: Search) -> str:
    """Say what was found, in one sentence."""
    best = found.best
    if best is None:
        return f"No policy that drops tokens meets {_wanted(found)} with {found.model.name}."
    return f"{found.model.name} meets {_wanted(found)} with {best.policy}; the KL divergence is {phrases.digits(best.kl)} nats per token."


def lead(found: Search) -> str:
    """Say what stands beside the headline."""
    best, said = found.best, f"{counted(len(found.rows), len(found.rows) + len(found.left_out))}."
    if best is None:
        return said
    return f"{said} {speeds(best)}" if best.right is None else f"{said} {answers_match(found, best)}. {speeds(best)}"


def context(found: Search) -> dict[str, Any]:
    """Return what the template shows besides the parts of all searches."""
    drawn = [row for row in found.rows if math.isfinite(row.kl) and row.kl > 0]
    points = [Point(row.policy, row.prefill_speedup, row.kl, "this" if row is found.best else "other") for row in drawn]
    return {
        "title": f"{found.model.name} · tokens dropped for {found.budget}",
        "conditions": _conditions(found),
        "right": right_answers(found),
        "lines": list(lines(found)),
        "pictures": [(picture.question, _patches(picture)) for picture in found.pictures],
        "frontier": Figure(_drawn(points, WIDE), _drawn(points, NARROW)) if points else None,
    }


def _drawn(points: list[Point], width: float) -> Any:
    start = min(1.0, math.floor(10 * min(point.x for point in points)) / 10)  # a small model is read no faster, or slower
    return tradeoff(points, replace(SPEED, start=start), "KL, nats per token", joined=_undominated(points), width=width, height=420)


def _patches(picture: Picture) -> Markup:
    """Draw an image with what is dropped of it covered."""
    high = SIDE * picture.rows / picture.columns
    across, down = SIDE / picture.columns, high / picture.rows
    kept = set(picture.kept)
    covered = [
        element("rect", x=number % picture.columns * across, y=number // picture.columns * down, width=across, height=down, class_="gone")
        for number in range(picture.rows * picture.columns)
        if number not in kept
    ]
    shown = element("image", href=f"data:image/png;base64,{picture.png}", width=SIDE, height=high, preserveAspectRatio="none")
    return image(SIDE, high, f"{len(kept)} of {picture.rows * picture.columns} tokens stay", shown, *covered)


def _undominated(points: list[Point]) -> list[Point]:
    """Points than which no other is both faster and nearer, by speed."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.x, point.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best[::-1]


def _wanted(found: Search) -> str:
    return f"{found.budget} of prefill speed" if found.budget.endswith("x") else f"a share of {found.budget} of the tokens"


def _conditions(found: Search) -> str:
    return f"Measured on {judged_on(found)}, {found.answer_tokens:,} tokens of answers. {speed_conditions(found)}"
