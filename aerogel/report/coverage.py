"""Quantized and unquantized layers, in words: by format, the same layer of every block on one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aerogel.io.record.schema import Coverage, pattern
from aerogel.report.phrases import percent

UNQUANTIZED = "not quantized"


class Share(NamedTuple):
    """The number of layers with weights or inputs in one format."""

    what: str
    form: str
    layers: int
    total: int

    @property
    def words(self) -> str:
        """The number of layers and their format."""
        return f"{self.layers} {self.form}" if self.form == UNQUANTIZED else f"{self.layers} in {self.form}"


class Left(NamedTuple):
    """Layers whose weights or inputs are not quantized though those of other layers are."""

    what: str
    names: tuple[tuple[str, int], ...]
    """Patterns, and how many layers each stands for."""


def grouped(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Return patterns of names, the same layer of every block as one, and the number of each."""
    return tuple(Counter(map(pattern, names)).items())


def shares(coverage: Coverage) -> Iterator[Share]:
    """Yield weights and inputs by format, those not quantized last."""
    for what, forms, left in _sides(coverage):
        for form, count in (*forms.items(), (UNQUANTIZED, len(left))):
            if count:
                yield Share(what, form, count, coverage.layers)


def unquantized(coverage: Coverage) -> Iterator[Left]:
    """Yield layers with unquantized weights, then those with unquantized inputs only; nothing where no layer has quantized ones."""
    weights = set(coverage.unquantized_weights)
    for what, forms, left in _sides(coverage):
        names = left if what == "weights" else [name for name in left if name not in weights]
        if forms and names:
            yield Left(what, grouped(names))


def zeros(coverage: Coverage) -> str | None:
    """Return a sentence on the zeros of pruned layers as they are stored; None where there are none."""
    if not (found := coverage.zeros.values()):
        return None
    low, high = (percent(share) for share in (min(found), max(found)))
    return f"{len(found)} layers are pruned: {low if low == high else f'{low} to {high}'} of their weights are zero as they are stored"


def _sides(coverage: Coverage) -> Iterator[tuple[str, dict[str, int], list[str]]]:
    yield "weights", coverage.weights, coverage.unquantized_weights
    yield "inputs", coverage.inputs, coverage.unquantized_inputs
