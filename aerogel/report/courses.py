"""Curves of policies: a line for each over the steps of a sampler, or over the share they leave out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aerogel.report.phrases import digits, percent
from aerogel.report.svg import Scale, element, image, label, line

TOP, BOTTOM, LEFT = 34.0, 48.0, 58.0
HEIGHT = 360.0
LINE = 15.0
"""Height of a line of labels."""


@dataclass(frozen=True)
class Course:
    """One line."""

    name: str
    values: Sequence[float]
    """Behind each step, or at the places that `at` says; what is not finite, and on a scale of ratios not above zero, is not drawn."""
    best: bool = False
    at: Sequence[float] = ()


Points = list[tuple[float, float]]


def courses(
    lines: Sequence[Course],
    title: str,
    *,
    across: str = "Step",
    rising: bool = False,
    log: bool = True,
    width: float = 956,
    height: float = HEIGHT,
) -> Markup:
    """Draw the lines on one scale, of equal ratios with `log`, each named at its end; of one value behind all steps only the end is drawn.

    `rising` says that more is better. Lines that say where their values are have dots there.
    """
    steps = max((len(one.values) for one in lines), default=2)
    shown = {one.name: _points(one, steps, log) for one in lines}
    right = width - 24 - 6.8 * max((len(one.name) for one in lines), default=0)
    x, y = _scales([point for points in shown.values() for point in points], log, right, height)
    drawn = [line(LEFT, height - BOTTOM, right, height - BOTTOM, "axis"), label(0, 16, f"{title} {'↑' if rising else '↓'} better", "small")]
    for tick in y.ticks():
        words = digits(tick, 1) if log else f"{tick:g}"
        drawn += [line(LEFT, y(tick), right, y(tick), "grid"), label(LEFT - 8, y(tick) + 4, words, "small", "end")]
    counted = not any(one.at for one in lines)
    for tick in x.ticks(8 if width > 500 else 4):
        if tick == int(tick) or not counted:
            drawn.append(label(x(tick), height - BOTTOM + 18, f"{tick:g}" if counted else percent(tick, 2), "small", "middle"))
    drawn.append(label(LEFT, height - 8, f"{across} →", "small"))
    for one in sorted(lines, key=lambda one: one.best):
        drawn += _drawn(one, [(x(place), y(value)) for place, value in shown[one.name]])
    return image(width, height, title, *drawn, *_names(lines, shown, x, y))


def _points(one: Course, steps: int, log: bool) -> Points:
    """Return the points; the one value of a line without places stands at the end."""
    at = one.at or (range(1, len(one.values) + 1) if len(one.values) > 1 else [steps])
    return [(place, value) for place, value in zip(at, one.values, strict=True) if math.isfinite(value) and (value > 0 or not log)]


def _scales(points: Points, log: bool, right: float, height: float) -> tuple[Scale, Scale]:
    places, values = ([point[axis] for point in points] or [1.0] for axis in (0, 1))
    room = 0.08 * (max(values) - min(values)) or 0.01
    ends = (min(values) / 1.2, max(values) * 1.2) if log else (min(values) - room, max(values) + room)
    return Scale(min(places), max(places), LEFT, right), Scale(*ends, height - BOTTOM, TOP, log=log)


def _drawn(one: Course, points: Points) -> list[Markup]:
    """A line, or a ring where it is one point only, and dots where it says where its points are."""
    said = element("title", f"{one.name}: {digits(one.values[-1]) if one.values else 'nothing'} at the end")
    if len(one.values) == 1 and not one.at:
        return [element("circle", said, cx=x, cy=y, r=5.0, class_="original") for x, y in points]
    drawn = [element("polyline", said, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_="path-best" if one.best else "path")]
    if one.at:
        drawn += [
            element("circle", said, cx=x, cy=y, r=5.0 if one.best else 3.5, class_="this" if one.best else "other") for x, y in points
        ]
    return drawn


def _names(lines: Sequence[Course], shown: dict[str, Points], x: Scale, y: Scale) -> list[Markup]:
    """Names behind the ends, the highest first, moved down where they would lie on one another; a thin line leads to ends further left."""
    drawn, last = [], -LINE
    for one in sorted((one for one in lines if shown[one.name]), key=lambda one: -shown[one.name][-1][1]):
        place, value = shown[one.name][-1]
        last = max(y(value) + 4, last + LINE)
        if x(place) < x.end - 1:
            drawn.append(line(x(place) + 6, y(value), x.end + 6, last - 4, "grid"))
        drawn.append(label(x.end + 10, last, one.name, "strong" if one.best else "small"))
    return drawn
