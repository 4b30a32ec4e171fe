"""How errors grow on their way: a line for each policy over the steps of the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aerogel.report.phrases import digits
from aerogel.report.svg import Scale, element, label, line, picture

TOP, BOTTOM, LEFT = 34.0, 48.0, 58.0
HEIGHT = 360.0
LINE = 15.0
"""Height of a line of labels."""


@dataclass(frozen=True)
class Course:
    """One line."""

    name: str
    values: Sequence[float]
    """Behind each step; where they are zero nothing is drawn."""
    best: bool = False


def courses(lines: Sequence[Course], title: str, *, width: float = 956, height: float = HEIGHT) -> Markup:
    """Draw the lines on one scale of equal ratios, each named at its end; of a line with one value only the end is drawn."""
    shown = {one.name: _points(one) for one in lines}
    values = [value for points in shown.values() for _, value in points] or [1.0]
    right = width - 24 - 6.8 * max((len(one.name) for one in lines), default=0)
    steps = max((len(one.values) for one in lines), default=2)
    x = Scale(1, steps, LEFT, right)
    y = Scale(min(values) / 1.2, max(values) * 1.2, height - BOTTOM, TOP, log=True)
    drawn = [line(LEFT, height - BOTTOM, right, height - BOTTOM, "axis"), label(0, 16, f"{title} ↓ better", "small")]
    for tick in y.ticks():
        drawn += [line(LEFT, y(tick), right, y(tick), "grid"), label(LEFT - 8, y(tick) + 4, digits(tick, 1), "small", "end")]
    for tick in x.ticks(8):
        if tick == int(tick):
            drawn.append(label(x(tick), height - BOTTOM + 18, f"{tick:g}", "small", "middle"))
    drawn.append(label(LEFT, height - 8, "Step →", "small"))
    for one in sorted(lines, key=lambda one: one.best):
        said = element("title", f"{one.name}: {digits(one.values[-1])} at the end")
        if len(one.values) == 1 and shown[one.name]:
            drawn.append(element("circle", said, cx=x(steps), cy=y(one.values[0]), r=5.0, class_="original"))
            continue
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in shown[one.name])
        drawn.append(element("polyline", said, points=places, class_="path-best" if one.best else "path"))
    return picture(width, height, title, *drawn, *_names(lines, shown, x, y))


def _points(one: Course) -> list[tuple[int, float]]:
    return [(step, value) for step, value in enumerate(one.values, 1) if math.isfinite(value) and value > 0]


def _names(lines: Sequence[Course], shown: dict[str, list[tuple[int, float]]], x: Scale, y: Scale) -> list[Markup]:
    """Names behind the ends, the highest first, moved down where they would lie on one another."""
    drawn, last = [], -LINE
    for one in sorted((one for one in lines if shown[one.name]), key=lambda one: -shown[one.name][-1][1]):
        last = max(y(shown[one.name][-1][1]) + 4, last + LINE)
        drawn.append(label(x.end + 10, last, one.name, "strong" if one.best else "small"))
    return drawn
