"""Quantization error by layer: a map of blocks by linear layers, with the mean of each row as a bar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from aerogel.io.record.schema import JournalLine
from aerogel.report.heat import cell, legend
from aerogel.report.phrases import percent
from aerogel.report.svg import element, image, label

BAR = 96
"""Longest bar."""


@dataclass(frozen=True)
class Cell:
    """All linear layers of one kind in one block: one, or its experts together."""

    lines: tuple[JournalLine, ...]

    @property
    def error(self) -> float:
        """Mean relative squared error."""
        return fmean(line.error for line in self.lines if line.error is not None)

    @property
    def fell(self) -> bool:
        """True where any of them was not compressed as the recipe says."""
        return any(line.fallback for line in self.lines)

    @property
    def words(self) -> str:
        """The text of the tooltip."""
        name = self.lines[0].name if len(self.lines) == 1 else f"{self.lines[0].block}.{self.lines[0].kind} (mean of {len(self.lines)})"
        return f"{name}: {percent(self.error)} {self.lines[0].scheme or ''}{' · fallback' if self.fell else ''}"


Table = dict[tuple[str, str], Cell]


def towers(journal: Sequence[JournalLine]) -> dict[str, Table]:
    """Journal lines that have an error, as one table (row kind, block) -> Cell for each list of blocks; nested lists are one."""
    found: dict[str, dict[tuple[str, str], list[JournalLine]]] = defaultdict(lambda: defaultdict(list))
    for entry in journal:
        if entry.error is not None and entry.block:
            parts = entry.block.split(".")
            names, numbers = ([part for part in parts if part.isdigit() == number] for number in (False, True))
            found[".".join(names)][entry.kind, ".".join(numbers)].append(entry)
    return {prefix: {place: Cell(tuple(lines)) for place, lines in table.items()} for prefix, table in found.items()}


def error_map(table: Table, width: float = 960, tall: bool = False) -> Markup:
    """Draw a table of cells: linear layers down and blocks across, or the other way round when `tall`."""
    kinds = list(dict.fromkeys(kind for kind, _ in table))
    blocks = sorted({block for _, block in table}, key=lambda block: [int(number) for number in block.split(".") if number])
    rows, columns = (blocks, kinds) if tall else (kinds, blocks)
    cells = {((block, kind) if tall else (kind, block)): found for (kind, block), found in table.items()}
    top = max(found.error for found in cells.values()) or 1.0
    left = 14 + (22 if tall else 6.6 * max(map(len, rows)))
    head = 12 + (6.2 * max(map(len, columns)) * 0.72 if tall else 14)
    step = min((width - left - BAR - 70) / len(columns), 44.0)
    pitch = 20.0 if tall else 26.0
    end, foot = left + step * len(columns), head + pitch * len(rows)
    drawn = [_columns(columns, left, step, head, tall)]
    for index, row in enumerate(rows):
        drawn.append(_row(row, [cells.get((row, column)) for column in columns], left, head + index * pitch, step, pitch, top))
        mean = fmean(cells[row, column].error for column in columns if (row, column) in cells)
        drawn.append(_bar(mean, end + 12, head + index * pitch, pitch, top))
    drawn.append(legend(left, foot + 18, "0", percent(top, 2)))
    return image(width, foot + 24, "Relative squared error of every linear layer", *drawn)


def _columns(columns: Sequence[str], left: float, step: float, head: float, tall: bool) -> Markup:
    every = max(1, round(26 / step)) if not tall else 1
    drawn = []
    for index, column in enumerate(columns):
        x = left + (index + 0.5) * step
        if tall:
            drawn.append(label(x, head - 8, column, "small", transform=f"rotate(-50 {x:.1f} {head - 8:.1f})"))
        elif index % every == 0:
            drawn.append(label(x, head - 8, column, "small", "middle"))
    return element("g", *drawn)


def _row(name: str, cells: Sequence[Cell | None], left: float, y: float, step: float, pitch: float, top: float) -> Markup:
    drawn = [label(left - 10, y + pitch / 2 + 4, name, "small", "end")]
    gap = 1.0 if step < 14 else 2.0
    for index, found in enumerate(cells):
        box = {"x": left + index * step, "y": y + 1, "width": step - gap, "height": pitch - 2, "rx": 2}
        if found is None:
            drawn.append(element("rect", **box, class_="void"))
            continue
        drawn.append(cell(found.error, top, found.words, **box))
        if found.fell:
            drawn.append(element("rect", **box, class_="fell"))
    return element("g", *drawn)


def _bar(mean: float, x: float, y: float, pitch: float, top: float) -> Markup:
    length = max(1.0, BAR * mean / top)
    return element(
        "g",
        element("rect", x=x, y=y + pitch / 2 - 4, width=length, height=8, rx=2, class_="bar"),
        label(x + length + 7, y + pitch / 2 + 4, percent(mean, 2), "small"),
    )
