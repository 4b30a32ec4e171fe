"""Error of 8-bit inputs, in words: the same layer of every block as one row, by the granularity of the scale."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from aerogel.io.record.measures import InputsResult
from aerogel.io.record.schema import pattern
from aerogel.report.phrases import digits, percent

KINDS = ("one", "step", "channel", "token")
"""Granularities of the scale, in the order of the columns."""


class Row(NamedTuple):
    """One layer in all blocks; the means of its errors."""

    name: str
    layers: int
    errors: tuple[str, ...]
    ratio: float
    """Error with one range, divided by that with a scale per token."""


def rows(found: InputsResult) -> Iterator[Row]:
    """Yield every layer in the order of a forward."""
    places: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for name, *errors in zip(found.layers, *(getattr(found, kind) for kind in KINDS), strict=True):
        places[pattern(name)].append(tuple(errors))
    for name, layers in places.items():
        means = [fmean(values) for values in zip(*layers, strict=True)]
        yield Row(name, len(layers), tuple(map(percent, means)), means[0] / means[-1] if means[-1] else math.inf if means[0] else 1.0)


def sentence(found: InputsResult) -> str:
    """Say what the rows show."""
    places = list(rows(found))
    worst = max(places, key=lambda row: row.ratio)
    more = sum(row.ratio > 2 for row in places)
    return (
        f"With one range for all steps and tokens, {more} of {len(places)} kinds of layers have more than twice the error of "
        f"a scale per token, at most {digits(worst.ratio)} times as large ({worst.name})."
    )
