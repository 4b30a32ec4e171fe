"""The staircase finds what looking at every pair of thresholds finds, in few evaluations, which outlive a process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from aerogel.errors import AerogelError
from aerogel.runtime.expert_skipping.frontier import Cell, Evaluations, Value, crossing, exhaustive, frontier, violations


def monotone(rows: int, columns: int, dice: random.Random) -> dict[Cell, Value]:
    """Errors and ratios that never fall along a row or a column; steps of zero make ties."""
    values: dict[Cell, Value] = {}
    for row in range(rows):
        for column in range(columns):
            before = [values[cell] for cell in ((row - 1, column), (row, column - 1)) if cell in values]
            error, ratio = (max((value[key] for value in before), default=0.0) + dice.choice([0, 0, 1, 2, 5]) for key in (0, 1))
            values[row, column] = Value(error, ratio)
    return values


def test_finds_the_optimum_of_a_thousand_staircases_in_few_evaluations() -> None:
    dice = random.Random(0)
    for _ in range(1000):
        rows, columns = dice.randint(1, 12), dice.randint(1, 12)
        values = monotone(rows, columns, dice)
        ratio = dice.uniform(0, 1.3) * values[rows - 1, columns - 1].ratio
        few, all_ = Evaluations(values.__getitem__), Evaluations(values.__getitem__)
        found, best = frontier(few, rows, columns, ratio), exhaustive(all_, rows, columns, ratio)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert found.value.error == best.value.error
            assert found.value.ratio >= ratio
            assert frontier(Evaluations(values.__getitem__), rows, columns, ratio) == found
        assert few.made <= 3 * max(rows, columns)
        assert all_.made == rows * columns


@pytest.mark.parametrize("search", [frontier, exhaustive])
def test_of_equal_errors_the_first_in_rows_wins(search: Any) -> None:
    found = search(lambda cell: Value(1.0, sum(cell)), 3, 3, 2)
    assert found.cell == (0, 2)


def test_what_is_known_is_not_evaluated_again() -> None:
    known = {(0, 0): Value(0.0, 0.0)}
    first = Evaluations(lambda cell: Value(1.0, 1.0), known=known)
    assert (first((0, 0)), first((1, 0)), first.made) == (Value(0.0, 0.0), Value(1.0, 1.0), 1)
    assert known[1, 0] == Value(1.0, 1.0), "whoever else knows it knows this too"


def test_a_single_column_is_bisected() -> None:
    values = [Value(float(row), row / 100) for row in range(101)]
    evaluations = Evaluations(lambda cell: values[cell[0]])
    found = crossing(evaluations, len(values), 0.305)
    assert found is not None
    assert found.cell == (31, 0)
    assert evaluations.made <= 8
    assert crossing(evaluations, len(values), 1.01) is None


def test_violations_count_falls_between_neighbours() -> None:
    known = {(0, 0): Value(0, 0), (0, 1): Value(2, 1), (0, 2): Value(1, 2), (1, 1): Value(3, 0.5), (5, 5): Value(0, 0)}
    assert violations(known) == {"steps": 3, "error": 1, "ratio": 1}


def test_a_stopped_search_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    file, asked = tmp_path / "deep" / "tried.jsonl", []

    def evaluate(cell: Cell) -> Value:
        asked.append(cell)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return Value(cell[0] + cell[1], cell[0] / 10)

    with pytest.raises(KeyboardInterrupt):
        exhaustive(Evaluations(evaluate, file, {"grid": [0.1, 0.2]}), 2, 2, 0.0)
    again = Evaluations(evaluate, file, {"grid": [0.1, 0.2]})
    assert again.known == {(0, 0): Value(0, 0), (0, 1): Value(1, 0)}
    assert exhaustive(again, 2, 2, 0.0) is not None
    assert again.made == 2
    assert len(file.read_text().splitlines()) == 5
    assert json.loads(file.read_text().splitlines()[0]) == {"grid": [0.1, 0.2]}
    with pytest.raises(AerogelError, match=r"tried\.jsonl holds evaluations of something else"):
        Evaluations(evaluate, file, {"grid": [0.1, 0.3]})
