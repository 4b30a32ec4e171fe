"""Measuring: every measure that fits, for a network and for its original beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from aerogel import catalog
from aerogel.data import given
from aerogel.engine import policies
from aerogel.engine.opening import open_model
from aerogel.engine.progress import Event, Tell
from aerogel.engine.result import add_metrics
from aerogel.errors import AerogelError, nearest
from aerogel.evaluate.measure import Measure, positions
from aerogel.evaluate.sampling import Sampling
from aerogel.evaluate.speed import Speed
from aerogel.evaluate.timing import Timed
from aerogel.io.record import files
from aerogel.io.source import ModelSource
from aerogel.layers.linear import QuantLinear
from aerogel.model.network import Network
from aerogel.model.placement import AUTO, Device, fitting
from aerogel.recipe import build, options_of

Scores = dict[str, dict[str, Any]]
Side = Literal["original", "compressed"]

# Tokens that speed is timed on at the end of a run.
_PROMPT, _ANSWER = 512, 32


def measure(
    network: Network,
    against: Network | None = None,
    measures: Sequence[str | Measure] | None = None,
    tell: Tell = lambda event: None,
    speed: bool = False,
    overrides: Iterable[str] = (),
    data: Any = None,
    column: str | None = None,
    side: Side | None = None,
) -> dict[str, Scores]:
    """Measure a network, and its original when given: {"compressed": {measure: facts}, "original": {...}}.

    A network that is measured alone stands under what it is: "original", or "compressed" where it has quantized layers or comes from a
    folder written here; `side` says so where that cannot be seen, as with pruned weights in memory.

    By default every measure that fits the network and need not be asked for, with `speed` a short measurement of speed too;
    `overrides` are `measure.option=value`, for measures that are taken by name. `data` is what those that read text or chats read
    instead of their own: a source by name, strings, records, a dataset, tokenised dicts or tensors; `column` names the column of its
    records. Raises AerogelError for an unknown measure or option, and for data that none of the measures reads.
    """
    for one in (network, against):
        if one is not None and one.checkpoint is not None:
            one.checkpoint.materialise(one.module, device=one.device)
    options = options_of(overrides, "measure.option=value, for example image_quality.count=512")
    chosen = _named(measures if measures is not None else [*_usual(network), *(_timed(network) if speed else ())], options)
    chosen = _reading(chosen, data, column, options)
    side = "compressed" if against is not None else side or _side_of(network)
    takes = [take for name, found in chosen for take in _takes(name, found, network, against, side, must=measures is not None)]
    scores: dict[str, Scores] = {"original": {}, "compressed": {}} if against is not None else {side: {}}
    done, total = 0, sum(take.passes for take in takes)
    with network.on_device(), nullcontext() if against is None else against.on_device():
        for take in takes:
            tell(Event("evaluate", done, total, take.what))
            for whose, facts in take.measure().items():
                scores[whose][take.name] = facts
            done += take.passes
    tell(Event("evaluate", total, total))
    return scores


def _side_of(network: Network) -> Side:
    """Return what a network that is measured alone is."""
    written = network.origin is not None and (network.origin / files.FILE).is_file()
    quantized = network.dequantized is not None or any(isinstance(part, QuantLinear) for part in network.module.modules())
    return "compressed" if written or quantized else "original"


def _reading(
    chosen: list[tuple[str, Measure]], data: Any, column: str | None, options: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Measure]]:
    """The measures with what they read, for those that read such data and were not told by an option what to read."""
    if data is None and column is None:
        return chosen
    data = None if data is None else given.parse(data, column)
    changes = {name: found.reads(data, column) for name, found in chosen}
    changes = {name: change for name, change in changes.items() if change is not None and not set(change) & set(options.get(name, {}))}
    if not changes:
        able = [name for name in catalog.names("measures") if catalog.find("measures", name).reads(data, column) is not None]
        raise AerogelError(f"the data would be read by none of the measures; take {' or '.join(able)}, or leave it out")
    return [(name, replace(found, **change) if (change := changes.get(name)) else found) for name, found in chosen]


def _usual(network: Network) -> list[str]:
    """The measures that fit a network and need not be asked for."""
    classes = {name: catalog.find("measures", name) for name in catalog.names("measures")}
    fitting = {name: cls for name, cls in classes.items() if cls.is_usual(network) and network.family.modality in cls.modalities}
    # What is for text only needs a tokenizer to read it.
    return [name for name, cls in fitting.items() if network.processor is not None or cls.modalities - {"text", "image-text"}]


def _timed(network: Network) -> list[Measure]:
    """A short measurement of speed, where the network writes text and has room for a prompt and an answer."""
    room = (positions(network) or _PROMPT + _ANSWER) - _ANSWER
    return [Speed(prompt=min(_PROMPT, room), new_tokens=_ANSWER)] if network.family.modality in Speed.modalities and room > 0 else []


def measure_models(
    model: str | ModelSource,
    against: str | ModelSource | None,
    measures: Sequence[str | Measure] | Callable[[Network], Sequence[Measure]] | None = None,
    tell: Tell = lambda event: None,
    overrides: Iterable[str] = (),
    device: Device = AUTO,
    data: Any = None,
    column: str | None = None,
) -> dict[str, Scores]:
    """Open models on a device and measure them, like `measure`; the numbers are added to the record of a compressed folder."""
    with fitting("what is measured"):
        network = open_model(model, lazy=False, device=device)
        original = open_model(against, lazy=False, device=device) if against is not None else None
        for opened in (network, original):
            if opened is not None and opened.origin is not None:
                files.verify(opened.origin)
        with policies.on(network, policies.load(network.origin, network.in_memory)):
            metrics = measure(
                network, original, measures(network) if callable(measures) else measures, tell, False, overrides, data, column
            )
    add_metrics(network.origin, metrics)
    return metrics


def time_models(
    model: str | ModelSource, against: str | ModelSource | None, options: Mapping[str, Any], device: Device = AUTO
) -> dict[str, Scores]:
    """Open models on a device and time them in turns; the numbers are added to the record of a compressed folder.

    `options` are those of the measure that fits the model, of which None stands for its own. Raises AerogelError for an unknown option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return measure_models(model, against, partial(_timing, given), device=device)


def _timing(options: Mapping[str, Any], network: Network) -> list[Measure]:
    """Return the measure that times a model of this kind."""
    modality = network.family.modality
    found = next((cls for cls in (Speed, Sampling) if modality in cls.modalities), None)
    if found is None:
        raise AerogelError(f"no benchmark for {modality} models yet; language and image models can be timed")
    return [build(found, options, f"a benchmark of {modality} models")]


class _Take(NamedTuple):
    """One measurement."""

    name: str
    what: str
    passes: int
    """Number of times, about, that it runs a model over the text; for progress."""
    measure: Callable[[], dict[str, Any]]
    """Gives facts by whose they are."""


def _takes(name: str, found: Measure, network: Network, against: Network | None, side: Side, must: bool) -> Iterator[_Take]:
    if isinstance(found, Timed):
        sides: dict[str, Network] = {side: network} if against is None else {"original": against, side: network}
        yield _Take(name, "speed" if against is None else "speed of both, in turns", 2, partial(found.compare, sides))
        return
    if against is not None and not found.compares:
        yield _Take(name, f"{name} of the original", 1, lambda: {"original": found.measure(against)})
    if against is not None or not found.compares or must:
        passes = 2 if found.compares else 1
        yield _Take(name, f"{name} of the {side}", passes, lambda: {side: found.measure(network, against)})


def _named(measures: Sequence[str | Measure], options: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Measure]]:
    by_name = {given for given in measures if isinstance(given, str)}
    if untaken := [name for name in options if name not in by_name]:
        raise AerogelError(f"an option of {untaken[0]!r} is set, but that measure is not taken{nearest(untaken[0], by_name)}")
    made = [_made(given, options.get(given, {})) if isinstance(given, str) else given for given in measures]
    return [(type(measure).__module__.rpartition(".")[2], measure) for measure in made]


def _made(name: str, options: Mapping[str, Any]) -> Measure:
    found: type[Measure] = catalog.find("measures", name)
    return build(found, options, f"measure {name!r}")
