"""Measuring: every measure that fits, for a network and for its original beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aerogel import catalog, policies
from aerogel.evaluate.measure import Measure, TextMeasure
from aerogel.model.load import load
from aerogel.model.network import Network
from aerogel.progress import Event, Tell
from aerogel.result import add_metrics

Scores = dict[str, dict[str, Any]]


def measure(
    network: Network, against: Network | None = None, measures: Sequence[str | Measure] | None = None, tell: Tell = lambda event: None
) -> dict[str, Scores]:
    """Measure a network, and its original when given: {"compressed": {measure: facts}, "original": {...}}.

    By default every measure that fits the network and need not be asked for. Raises AerogelError for an unknown measure.
    """
    chosen = {name: found for name, found in _chosen(network, measures) if against is not None or not found.compares or measures}
    pairs: list[tuple[str, str, Network]] = []
    for name, found in chosen.items():
        if against is not None and not found.compares:
            pairs.append(("original", name, against))
        pairs.append(("compressed", name, network))
    scores: dict[str, Scores] = {"original": {}, "compressed": {}} if against is not None else {"compressed": {}}
    done, total = 0, sum(_passes(chosen[name]) for _, name, _ in pairs)
    for whose, name, subject in pairs:
        tell(Event("evaluate", done, total, f"{name} of the {whose}"))
        scores[whose][name] = chosen[name].measure(subject, against if whose == "compressed" else None)
        done += _passes(chosen[name])
    tell(Event("evaluate", total, total))
    return scores


def measure_models(model: str, against: str | None, measures: Sequence[str] | None, tell: Tell) -> dict[str, Scores]:
    """Open models and measure them; the numbers are added to the record of a compressed folder."""
    network = load(model, lazy=False)
    original = load(against, lazy=False) if against is not None else None
    with policies.on(network, policies.load(network.origin)):
        metrics = measure(network, original, measures, tell)
    add_metrics(network.origin, metrics)
    return metrics


def _chosen(network: Network, measures: Sequence[str | Measure] | None) -> Iterator[tuple[str, Measure]]:
    if measures is not None:
        for given in measures:
            yield (given, catalog.find("measures", given)()) if isinstance(given, str) else (_name_of(given), given)
        return
    for name in catalog.names("measures"):
        cls = catalog.find("measures", name)
        readable = network.processor is not None or not issubclass(cls, TextMeasure)
        if not cls.asked and network.family.modality in cls.modalities and readable:
            yield name, cls()


def _passes(measure: Measure) -> int:
    """How often a measure runs a network over its text; for progress."""
    return 2 if isinstance(measure, TextMeasure) and measure.compares else 1


def _name_of(measure: Measure) -> str:
    return type(measure).__module__.rpartition(".")[2]
