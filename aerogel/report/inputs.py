"""How inputs fit into 8 bits, in words: linears of the same place in every block as one row, by what shares a scale."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from aerogel.report.phrases import digits, percent
from aerogel.report.record import Inputs, pattern

KINDS = ("one", "step", "channel", "token")
"""What shares a scale, in the order of the columns."""


class Row(NamedTuple):
    """One place in all blocks; the means of its errors."""

    name: str
    layers: int
    errors: tuple[str, ...]
    ratio: float
    """How many times as much one range loses as a scale a token."""


def rows(found: Inputs) -> Iterator[Row]:
    """Every place in the order of a forward."""
    places: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for name, *errors in zip(found.layers, *(getattr(found, kind) for kind in KINDS), strict=True):
        places[pattern(name)].append(tuple(errors))
    for name, layers in places.items():
        means = [fmean(values) for values in zip(*layers, strict=True)]
        yield Row(name, len(layers), tuple(map(percent, means)), means[0] / means[-1] if means[-1] else math.inf if means[0] else 1.0)


def sentence(found: Inputs) -> str:
    """What the rows come to."""
    places = list(rows(found))
    worst = max(places, key=lambda row: row.ratio)
    more = sum(row.ratio > 2 for row in places)
    return (
        f"With one range for all steps and tokens {more} of {len(places)} kinds of layers lose more than twice what they lose with a scale "
        f"a token, at the most {digits(worst.ratio)} times as much ({worst.name})."
    )
