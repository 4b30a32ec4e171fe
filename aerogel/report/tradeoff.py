"""The trade-off image: quality against size or speed, the original and every run of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup

from aerogel.report.phrases import digits
from aerogel.report.svg import Scale, element, image, label, line

TOP, RIGHT, BOTTOM, LEFT = 34, 20, 48, 52
HEIGHT = 340.0
LINE = 17
"""Height of a line of labels."""


Role = Literal["original", "this", "other"]


@dataclass(frozen=True)
class Axis:
    """Axis against which quality is drawn: a number of one measure."""

    title: str
    measure: str
    field: str
    scale: float
    """From the measured unit to the one in the title."""
    better: Literal["left", "right"]
    start: float = 0.0
    """Its first value."""


SIZE = Axis("Weights on disk, MB", "size", "bytes", 1e-6, "left")
SPEED = Axis("Decoding, tokens per second", "speed", "decode_tokens_per_second", 1.0, "right")

IMAGES = Axis("Images per minute", "sampling", "images_per_minute", 1.0, "right")


@dataclass(frozen=True)
class Point:
    """One network in the image."""

    name: str
    x: float
    y: float
    role: Role = "other"


def tradeoff(
    points: Sequence[Point], axis: Axis, y_title: str, *, joined: Sequence[Point] | None = None, width: float = 460, height: float = HEIGHT
) -> Markup:
    """Draw points with finite positive y, of which less is better, along an axis.

    A line goes from the original to this run, or through the points that are `joined`.
    The y axis shows the range there is, by ratio when it spans more than a factor of four.
    """
    points = [point for point in points if math.isfinite(point.y) and point.y > 0]
    x, y = _scales(points, axis, width, height)
    return image(
        width,
        height,
        f"{y_title} against {axis.title}",
        *_grid(x, y, width, height),
        label(0, 16, f"{y_title} ↓ better", "small"),
        label(LEFT, height - 8, f"{axis.title} {'←' if axis.better == 'left' else '→'} better", "small"),
        *_moves(_from_original(points) if joined is None else joined, x, y),
        *_names(points, x, y, width),
        *(_dot(point, x, y) for point in sorted(points, key=lambda point: point.role == "this")),
    )


def _scales(points: Sequence[Point], axis: Axis, width: float, height: float) -> tuple[Scale, Scale]:
    right = axis.start + (max((point.x for point in points), default=axis.start + 1.0) - axis.start) * 1.12
    low, high = min((point.y for point in points), default=0.0), max((point.y for point in points), default=1.0)
    log = low > 0 and high / low > 4
    room = 1.25 if log else max(0.18 * (high - low), 0.02 * high, 1e-9)
    low, high = (low / room, high * room) if log else (max(0.0, low - room), high + room)
    return Scale(axis.start, right, LEFT, width - RIGHT), Scale(low, high, height - BOTTOM, TOP, log)


def _grid(x: Scale, y: Scale, width: float, height: float) -> list[Markup]:
    drawn = [line(LEFT, height - BOTTOM, width - RIGHT, height - BOTTOM, "axis")]
    for tick in y.ticks(4):
        drawn += [line(LEFT, y(tick), width - RIGHT, y(tick), "grid"), label(LEFT - 8, y(tick) + 4, _tick(tick), "small", "end")]
    for tick in x.ticks(4 if width < 420 else 5):
        drawn += [line(x(tick), height - BOTTOM, x(tick), height - BOTTOM + 4, "axis")]
        drawn += [label(x(tick), height - BOTTOM + 18, _tick(tick), "small", "middle")]
    return drawn


def _tick(value: float) -> str:
    return f"{value:,.6g}" if value < 1e5 else digits(value, 2)


def _from_original(points: Sequence[Point]) -> list[Point]:
    """The original and this run, as far as they are there."""
    return [point for role in ("original", "this") for point in points if point.role == role]


def _moves(joined: Sequence[Point], x: Scale, y: Scale) -> list[Markup]:
    """A thin line from point to point."""
    return [line(x(start.x), y(start.y), x(end.x), y(end.y), "move") for start, end in pairwise(joined)]


def _dot(point: Point, x: Scale, y: Scale) -> Markup:
    name = element("title", f"{point.name}: {digits(point.x)}, {digits(point.y)}")
    return element("circle", name, cx=x(point.x), cy=y(point.y), r=5.0 if point.role == "other" else 7.0, class_=point.role)


def _names(points: Sequence[Point], x: Scale, y: Scale, width: float) -> list[Markup]:
    """Names beside their points: off the line of the move, inside the image, moved down where they would lie on one another."""
    start = next((point.x for point in points if point.role == "original"), math.inf)
    drawn, taken = [], list[tuple[float, float, float]]()
    for point in sorted(points, key=lambda point: (y(point.y), point.x)):
        reach = 7.2 * len(point.name) + 12
        fits_left, fits_right = x(point.x) - reach > LEFT, x(point.x) + reach < width
        behind = (point.role == "this" and point.x < start and fits_left) or not fits_right
        left = x(point.x) - reach if behind else x(point.x) + 12
        place = y(point.y) + 4 + (LINE if behind and point.role == "original" else 0)
        while any(abs(place - other) < LINE and left < end and begin < left + reach for begin, end, other in taken):
            place += LINE
        taken.append((left, left + reach, place))
        style = "halo strong" if point.role == "this" else "halo"
        drawn.append(label(x(point.x) + (-12 if behind else 12), place, point.name, style, "end" if behind else "start"))
    return drawn
