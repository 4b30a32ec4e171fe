"""Temporal features of a denoiser: three maps of blocks by time steps, side by side or one below the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup

from aerogel.io.record.measures import TemporalResult
from aerogel.report.heat import cell, legend, shade
from aerogel.report.phrases import digits, near_one, percent
from aerogel.report.svg import element, image, label

GAP = 28.0
"""Between maps."""
LEAST = 2.0
"""Narrowest column; where there are more steps than room, a column is the mean of several."""
HEAD, FOOT = 24.0, 46.0
"""Above the rows of a map, for its name; below them, for its steps and its scale."""


@dataclass(frozen=True)
class _Map:
    """Content of one map."""

    name: str
    values: list[list[float]]
    """Of every block at every step."""
    show: Callable[[float], str]
    wrong: bool = False
    """True where it shows mismatches, false where it shows an amount."""

    @property
    def top(self) -> float:
        """The value of the strongest colour."""
        return max((value for row in self.values for value in row if math.isfinite(value)), default=0.0) or 1.0


@dataclass(frozen=True)
class _Place:
    """The position of a map."""

    x: float
    y: float
    width: float
    pitch: float
    """Height of a row."""


class Row(NamedTuple):
    """One block in words."""

    name: str
    error: str
    cosine: str
    wrong: str


def time_maps(found: TemporalResult, width: float = 960, stacked: bool = False) -> Markup:
    """Draw error, cosine distance and mismatch of every block at every step, steps across."""
    names = short(found.layers)
    left = 12 + 6.6 * max(map(len, names))
    pitch = 18.0 if stacked else 20.0
    tall = HEAD + pitch * len(names) + FOOT
    below = tall + GAP
    maps = [
        _Map("Error", found.errors, percent),
        _Map("Cosine distance (1 − cosine)", [[1 - cosine for cosine in row] for row in found.cosines], digits),
        _Map("Nearer to another step", [[float(wrong) for wrong in row] for row in found.mismatches], percent, wrong=True),
    ]
    across = width - left if stacked else (width - left - 2 * GAP) / 3
    drawn = []
    for index, shown in enumerate(maps):
        place = _Place(left, index * below, across, pitch) if stacked else _Place(left + index * (across + GAP), 0, across, pitch)
        drawn.append(_drawn(shown, found, names if stacked or not index else None, place, words=not stacked))
    return image(width, tall + 2 * below if stacked else tall, "Temporal features of every block at every step", *drawn)


def rows(found: TemporalResult) -> Iterator[Row]:
    """Yield every block in words, in the order of a forward."""
    for name, errors, cosines, wrong in zip(found.layers, found.errors, found.cosines, found.mismatches, strict=True):
        yield Row(name, percent(fmean(errors)), near_one(min(cosines)), f"{sum(wrong)} of {len(wrong)}")


def sentence(found: TemporalResult) -> str:
    """Say what the maps show."""
    wrong, cells = sum(map(sum, found.mismatches)), len(found.layers) * len(found.steps)
    told = f"{wrong:,} of {cells:,} ({percent(found.mismatch)})" if wrong else f"None of {cells:,}"
    return (
        f"Over {len(found.layers)} blocks and {len(found.steps)} steps the error is {percent(found.error)} of the features' squared size. "
        f"The mean cosine similarity with the original's is {near_one(found.cosine)}, the lowest {near_one(found.least_cosine)}. "
        f"{told} {'is' if wrong == 1 else 'are'} nearer to the original's feature of another step."
    )


def short(names: Sequence[str]) -> list[str]:
    """Names without the parts that all of them have."""
    parts = [name.split(".") for name in names]
    common = set(parts[0]).intersection(*parts) if len(parts) > 1 else set()
    common = {part for part in common if not part.isdigit()}
    return [".".join(part for part in own if part not in common) or ".".join(own) for own in parts]


def _drawn(shown: _Map, found: TemporalResult, names: Sequence[str] | None, place: _Place, words: bool) -> Markup:
    """One map: its name, its rows, the steps below them, the scale."""
    columns = max(1, min(len(found.steps), int(place.width / LEAST)))
    foot = place.y + HEAD + place.pitch * len(found.layers)
    drawn = [label(place.x, place.y + 12, shown.name, "strong")]
    for index, values in enumerate(shown.values):
        y = place.y + HEAD + index * place.pitch
        if names is not None:
            drawn.append(label(place.x - 10, y + place.pitch / 2 + 4, names[index], "small", "end"))
        drawn.append(_row(shown, found, index, _binned(values, columns), _Place(place.x, y, place.width, place.pitch), words))
    drawn += [
        label(place.x, foot + 14, f"step {found.steps[0]:g}", "small"),
        label(place.x + place.width, foot + 14, f"{found.steps[-1]:g}", "small", "end"),
        _scale(shown, place.x, foot + 38),
    ]
    return element("g", *drawn)


def _row(shown: _Map, found: TemporalResult, index: int, values: Sequence[float], place: _Place, words: bool) -> Markup:
    wide = place.width / len(values)
    gap = 1.0 if wide >= 5 else 0.0
    drawn = []
    for column, value in enumerate(values):
        step = found.steps[column * len(found.steps) // len(values)]
        said = f"{found.layers[index]}, step {step:g}: {_said(shown, value)}" if words else ""
        box = {"x": place.x + column * wide, "y": place.y + 1, "width": wide - gap, "height": place.pitch - 2}
        if shown.wrong and value:
            drawn.append(element("rect", *([element("title", said)] if said else []), **box, class_="wrong", fill_opacity=shade(value, 1)))
        else:
            drawn.append(cell(value, shown.top, said, **box))
    return element("g", *drawn)


def _said(shown: _Map, value: float) -> str:
    if not shown.wrong:
        return shown.show(value)
    return (
        "nearest to its own step" if not value else "nearer to another step" if value == 1 else f"{percent(value)} nearer to another step"
    )


def _scale(shown: _Map, x: float, y: float) -> Markup:
    if not shown.wrong:
        return legend(x, y, "0", shown.show(shown.top))
    return element(
        "g",
        element("rect", x=x, y=y - 9, width=14, height=10, class_="heat", fill_opacity=shade(0, 1)),
        label(x + 20, y, "own step", "small"),
        element("rect", x=x + 76, y=y - 9, width=14, height=10, class_="wrong"),
        label(x + 96, y, "another step", "small"),
    )


def _binned(values: Sequence[float], columns: int) -> list[float]:
    """Means of neighbours, so many."""
    edges = [column * len(values) // columns for column in range(columns + 1)]
    return [fmean(values[start:end]) for start, end in pairwise(edges)]
