"""Measuring: every measure that fits, for a network and for its original beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from aerogel import catalog
from aerogel.engine import policies
from aerogel.engine.progress import Event, Tell
from aerogel.engine.result import add_metrics
from aerogel.evaluate.measure import Measure, positions
from aerogel.evaluate.speed import Speed
from aerogel.model.load import load
from aerogel.model.network import Network

Scores = dict[str, dict[str, Any]]

# Tokens that speed is timed on at the end of a run.
_PROMPT, _ANSWER = 512, 32


def measure(
    network: Network,
    against: Network | None = None,
    measures: Sequence[str | Measure] | None = None,
    tell: Tell = lambda event: None,
    speed: bool = False,
) -> dict[str, Scores]:
    """Measure a network, and its original when given: {"compressed": {measure: facts}, "original": {...}}.

    By default every measure that fits the network and need not be asked for, with `speed` a short measurement of speed too. Raises
    AerogelError for an unknown measure.
    """
    chosen = _named(measures if measures is not None else [*_usual(network), *(_timed(network) if speed else ())])
    takes = [take for name, found in chosen for take in _takes(name, found, network, against, must=measures is not None)]
    scores: dict[str, Scores] = {"original": {}, "compressed": {}} if against is not None else {"compressed": {}}
    done, total = 0, sum(take.passes for take in takes)
    for take in takes:
        tell(Event("evaluate", done, total, take.what))
        for whose, facts in take.measure().items():
            scores[whose][take.name] = facts
        done += take.passes
    tell(Event("evaluate", total, total))
    return scores


def _usual(network: Network) -> list[Measure]:
    """The measures that fit a network and need not be asked for."""
    classes = [catalog.find("measures", name) for name in catalog.names("measures")]
    fitting = [cls for cls in classes if not cls.asked and network.family.modality in cls.modalities]
    # What is for text only needs a tokenizer to read it.
    return [cls() for cls in fitting if network.processor is not None or cls.modalities - {"text", "image-text"}]


def _timed(network: Network) -> list[Measure]:
    """A short measurement of speed, where the network writes text and has room for a prompt and an answer."""
    room = (positions(network) or _PROMPT + _ANSWER) - _ANSWER
    return [Speed(prompt=min(_PROMPT, room), new_tokens=_ANSWER)] if network.family.modality in Speed.modalities and room > 0 else []


def measure_models(model: str, against: str | None, measures: Sequence[str | Measure] | None, tell: Tell) -> dict[str, Scores]:
    """Open models and measure them; the numbers are added to the record of a compressed folder."""
    network = load(model, lazy=False)
    original = load(against, lazy=False) if against is not None else None
    with policies.on(network, policies.load(network.origin)):
        metrics = measure(network, original, measures, tell)
    add_metrics(network.origin, metrics)
    return metrics


def time_models(model: str, against: str | None, speed: Speed) -> dict[str, Scores]:
    """Open models and time them in turns; the numbers are added to the record of a compressed folder."""
    return measure_models(model, against, [speed], lambda event: None)


class _Take(NamedTuple):
    """One measurement."""

    name: str
    what: str
    passes: int
    """How often it runs a network over the text, about; for progress."""
    measure: Callable[[], dict[str, Any]]
    """Gives facts by whose they are."""


def _takes(name: str, found: Measure, network: Network, against: Network | None, must: bool) -> Iterator[_Take]:
    if isinstance(found, Speed):
        sides = {"compressed": network} if against is None else {"original": against, "compressed": network}
        yield _Take(name, "speed of both, in turns", 2, partial(found.compare, sides))
        return
    if against is not None and not found.compares:
        yield _Take(name, f"{name} of the original", 1, lambda: {"original": found.measure(against)})
    if against is not None or not found.compares or must:
        passes = 2 if found.compares else 1
        yield _Take(name, f"{name} of the compressed", passes, lambda: {"compressed": found.measure(network, against)})


def _named(measures: Sequence[str | Measure]) -> list[tuple[str, Measure]]:
    made = [catalog.find("measures", given)() if isinstance(given, str) else given for given in measures]
    return [(type(measure).__module__.rpartition(".")[2], measure) for measure in made]
