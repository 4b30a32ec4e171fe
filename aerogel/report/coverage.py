"""What is in codes, in words: layers by format, and those left in float with the same place in every block as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aerogel.report.record import Coverage, pattern


class Share(NamedTuple):
    """How many layers have something in one format."""

    what: str
    form: str
    layers: int
    total: int


class Left(NamedTuple):
    """What is in float though other layers have it in codes."""

    what: str
    names: tuple[tuple[str, int], ...]
    """Patterns, and how many layers each stands for."""


def grouped(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Patterns of names, those of the same place in every block as one, and how many there are of each."""
    return tuple(Counter(map(pattern, names)).items())


def shares(coverage: Coverage) -> Iterator[Share]:
    """Weights and inputs by format, float last."""
    for what, forms, left in _sides(coverage):
        for form, count in (*forms.items(), ("float", len(left))):
            if count:
                yield Share(what, form, count, coverage.layers)


def left_in_float(coverage: Coverage) -> Iterator[Left]:
    """The layers whose weights are in float, and those of which only the inputs are; nothing where no layer has them in codes."""
    weights = set(coverage.float_weights)
    for what, forms, left in _sides(coverage):
        names = left if what == "weights" else [name for name in left if name not in weights]
        if forms and names:
            yield Left(what, grouped(names))


def _sides(coverage: Coverage) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    yield "weights", coverage.weights, coverage.float_weights
    yield "inputs", coverage.inputs, coverage.float_inputs
