"""A figure of each layer, such as its error or its share of zeros: a map of blocks by layers, with the mean of each row as a bar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from markupsafe import Markup

from aerogel.io.record.schema import JournalLine, kind_of
from aerogel.report.heat import cell, legend
from aerogel.report.phrases import percent
from aerogel.report.svg import element, image, label

BAR = 96
"""Longest bar."""
_ERRORS = {"weights": "error of the weights", "outputs": "error of the outputs"}


@dataclass(frozen=True)
class Cell:
    """All layers of one kind in one block: one, or its experts together."""

    value: float
    """A share of one, the mean over the layers."""
    words: str
    """The text of the tooltip."""
    fell: bool = False
    """True where any of them was not compressed as the recipe says."""


Table = dict[tuple[str, str], Cell]
Item = TypeVar("Item")


def by_tower(items: Iterable[tuple[str, str, Item]]) -> dict[str, dict[tuple[str, str], list[Item]]]:
    """Put (name of the layer, name of its block, item) into one table (row kind, block) -> items for each list of blocks.

    Nested lists are one; layers around the blocks are left out.
    """
    found: dict[str, dict[tuple[str, str], list[Item]]] = defaultdict(lambda: defaultdict(list))
    for name, block, item in items:
        if block:
            parts = block.split(".")
            names, numbers = ([part for part in parts if part.isdigit() == number] for number in (False, True))
            found[".".join(names)][kind_of(name, block), ".".join(numbers)].append(item)
    return found


def towers(journal: Sequence[JournalLine]) -> dict[str, Table]:
    """Errors of journal lines, as one table for each list of blocks; those of several methods, or of weights, each have their own."""
    apart: dict[tuple[str | None, str | None], list[JournalLine]] = defaultdict(list)
    for entry in journal:
        if entry.error is not None and entry.block:
            apart[entry.method, entry.error_of].append(entry)
    tables: dict[str, Table] = {}
    for (method, error_of), lines in apart.items():
        about = [method] if len(apart) > 1 and method else []
        about += [_ERRORS[error_of]] if error_of == "weights" or (error_of and len(apart) > 1) else []
        for tower, table in by_tower((line.name, line.block, line) for line in lines).items():
            tables[", ".join([tower, *about])] = {place: _of_errors(found) for place, found in table.items()}
    return tables


def _of_errors(lines: Sequence[JournalLine]) -> Cell:
    error, fell = fmean(line.error for line in lines if line.error is not None), any(line.fallback for line in lines)
    first = lines[0]
    name = first.name if len(lines) == 1 else f"{first.block}.{first.kind} (mean of {len(lines)})"
    return Cell(error, f"{name}: {percent(error)} {first.scheme or ''}{' · fallback' if fell else ''}", fell)


def zeros(shares: Mapping[str, float], blocks: Mapping[str, str], asked: Mapping[str, float] | None = None) -> dict[str, Table]:
    """Shares of zeros by layer, as one table for each list of blocks; `asked` are those that an allocation gave."""

    def of(names: Sequence[str]) -> Cell:
        share = fmean(shares[name] for name in names)
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it (mean)"
        given = f", {percent(asked[names[0]])} allocated" if asked and names[0] in asked and len(names) == 1 else ""
        return Cell(share, f"{name}: {percent(share)} zeros{given}")

    found = by_tower((name, blocks[name], name) for name in shares)
    return {tower: {place: of(names) for place, names in table.items()} for tower, table in found.items()}


def error_map(table: Table, width: float = 960, tall: bool = False) -> Markup:
    """Draw the relative squared error of layers."""
    return layer_map(table, "Relative squared error of every linear layer", width, tall)


def zeros_map(table: Table, width: float = 960, tall: bool = False) -> Markup:
    """Draw the share of zeros of layers."""
    return layer_map(table, "Share of zeros of every layer", width, tall, top=1.0)


def layer_map(table: Table, title: str, width: float = 960, tall: bool = False, top: float | None = None) -> Markup:
    """Draw a table of cells: layers down and blocks across, or the other way round when `tall`; shades are full at `top` or the most."""
    kinds = list(dict.fromkeys(kind for kind, _ in table))
    blocks = sorted({block for _, block in table}, key=lambda block: [int(number) for number in block.split(".") if number])
    rows, columns = (blocks, kinds) if tall else (kinds, blocks)
    cells = {((block, kind) if tall else (kind, block)): found for (kind, block), found in table.items()}
    top = top or max(found.value for found in cells.values()) or 1.0
    left = 14 + (22 if tall else 6.9 * max(map(len, rows)))
    head = 12 + (6.2 * max(map(len, columns)) * 0.8 if tall else 14)
    step = min((width - left - BAR - 70) / len(columns), 44.0)
    pitch = 20.0 if tall else 26.0
    end, foot = left + step * len(columns), head + pitch * len(rows)
    drawn = [_columns(columns, left, step, head, tall)]
    for index, row in enumerate(rows):
        drawn.append(_row(row, [cells.get((row, column)) for column in columns], left, head + index * pitch, step, pitch, top))
        mean = fmean(cells[row, column].value for column in columns if (row, column) in cells)
        drawn.append(_bar(mean, end + 12, head + index * pitch, pitch, top))
    drawn.append(legend(left, foot + 18, "0", percent(top, 2)))
    return image(width, foot + 24, title, *drawn)


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
        drawn.append(cell(found.value, top, found.words, **box))
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
