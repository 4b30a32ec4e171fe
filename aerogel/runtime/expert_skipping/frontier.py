"""Searches over grids of thresholds: the smallest error among those that skip enough, in few evaluations.

Both the error and the ratio are taken not to fall as a threshold grows. The MoDES frontier search (arXiv:2511.15690) then needs one walk
down a staircase instead of the whole grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from aerogel.errors import AerogelError

Cell = tuple[int, int]


class Value(NamedTuple):
    """Figures of one pass over the calibration set."""

    error: float
    ratio: float


class Found(NamedTuple):
    """Two thresholds by number, and what they give."""

    cell: Cell
    value: Value


Evaluate = Callable[[Cell], Value]


@dataclass
class Evaluations:
    """Evaluations by cell, each made once; with a file they outlive the process, which has to be about the same thing again."""

    evaluate: Evaluate
    file: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """Description of what the numbers hold for; a file of another is refused."""
    known: dict[Cell, Value] = field(default_factory=dict)
    """Evaluations known before; new ones are added."""
    made: int = field(default=0, init=False)
    """Number of evaluations made by this process."""

    def __post_init__(self) -> None:
        if self.file is None:
            return
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(dict(self.about)) + "\n")
            return
        about, *lines = self.file.read_text().splitlines()
        if json.loads(about) != json.loads(json.dumps(dict(self.about))):
            raise AerogelError(f"{self.file} holds evaluations of something else; give another file, or remove it to start anew")
        for line in lines:
            first, second, error, ratio = json.loads(line)
            self.known[first, second] = Value(error, ratio)

    def __call__(self, cell: Cell) -> Value:
        """Evaluate, or remember."""
        if cell not in self.known:
            self.known[cell] = self.evaluate(cell)
            self.made += 1
            if self.file is not None:
                with self.file.open("a") as stream:
                    stream.write(json.dumps([*cell, *self.known[cell]]) + "\n")
        return self.known[cell]


def frontier(evaluate: Evaluate, rows: int, columns: int, ratio: float) -> Found | None:
    """Return the cell with the least error among those that skip at least `ratio`, by a walk along their border; None if none does.

    Of equal errors the first in rows wins. At most twice as many cells as rows and columns together are evaluated.
    """
    if evaluate((rows - 1, columns - 1)).ratio < ratio:
        return None
    best: Found | None = None
    column = columns - 1
    for row in range(rows):
        while column >= 0 and evaluate((row, column)).ratio >= ratio:
            column -= 1
        if column + 1 < columns:
            best = _better(best, evaluate, (row, column + 1))
        if column < 0:  # every further row skips more at a larger error
            break
    return best


def exhaustive(evaluate: Evaluate, rows: int, columns: int, ratio: float) -> Found | None:
    """The same by looking at every cell."""
    best: Found | None = None
    for row in range(rows):
        for column in range(columns):
            if evaluate((row, column)).ratio >= ratio:
                best = _better(best, evaluate, (row, column))
    return best


def crossing(evaluate: Evaluate, rows: int, ratio: float) -> Found | None:
    """Return the first row of one column that skips at least `ratio`, by bisection; None if the last does not."""
    if evaluate((rows - 1, 0)).ratio < ratio:
        return None
    low, high = 0, rows - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if evaluate((middle, 0)).ratio >= ratio else (middle + 1, high)
    return Found((high, 0), evaluate((high, 0)))


def violations(known: Mapping[Cell, Value]) -> dict[str, int]:
    """Count how often error and ratio fell from one evaluated cell to the next in a row or column, and of how many steps."""
    counts = {"steps": 0, "error": 0, "ratio": 0}
    for low, high in _neighbours(known):
        counts["steps"] += 1
        counts["error"] += known[high].error < known[low].error
        counts["ratio"] += known[high].ratio < known[low].ratio
    return counts


def _neighbours(cells: Iterable[Cell]) -> Iterable[tuple[Cell, Cell]]:
    for axis in (0, 1):
        ordered = sorted(cells, key=lambda cell: (cell[1 - axis], cell[axis]))
        for low, high in pairwise(ordered):
            if low[1 - axis] == high[1 - axis]:
                yield low, high


def _better(best: Found | None, evaluate: Evaluate, cell: Cell) -> Found:
    found = Found(cell, evaluate(cell))
    return best if best is not None and best.value.error <= found.value.error else found
