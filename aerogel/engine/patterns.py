"""Patterns of a recipe that mean nothing in the model at hand: a mistyped name would leave a layer as it is without a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from torch import nn

from aerogel.io.record.schema import pattern as kind_of
from aerogel.layers.conv import Layer
from aerogel.layers.linear import QuantLinear
from aerogel.model.match import matches
from aerogel.model.network import Network
from aerogel.recipe import Step

_OPTIONS = ("targets", "ignore", "overrides", "unclipped")
_CLASSES = ("Linear", "Conv2d")
"""Kinds of layers that a recipe for many models may name, though some have none of them."""
_SHOWN = 6


def unmatched(network: Network, step: Step) -> Iterator[str]:
    """Yield, for each pattern of a step that matches nothing in the model, a line with the nearest names.

    Patterns that the method has by default are left out, lists of the family (`@name`) too: they are made for many models.
    """
    defaults = {field.name: _patterns(_default(field)) for field in dataclasses.fields(step.method)}  # type: ignore[arg-type]
    for option in filter(step.has, _OPTIONS):
        for pattern in _patterns(getattr(step.method, option)):
            if pattern in defaults[option] or pattern in _CLASSES or pattern.startswith("@"):
                continue
            found = _candidates(network, step, option)
            if not any(matches(name, (pattern,), module) for name, module in found.items()):
                yield f"{step.name}: no {_kind(step)} matches {pattern!r} in {option}{_advice(network, pattern, sorted(found))}"


def _patterns(value: object) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, tuple | list | Mapping) else ()


def _default(field: dataclasses.Field[object]) -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _modules(network: Network) -> dict[str, nn.Module]:
    return {name: module for name, module in network.module.named_modules() if name}


def _kind(step: Step) -> str:
    """Return the kind of module that the patterns of a step name."""
    return "attention" if {"attention", "kv_cache"} & step.method.requires else "layer"


def _candidates(network: Network, step: Step, option: str) -> dict[str, nn.Module]:
    """The modules that an option of a step may name: layers, and to be ignored also what has weights of another kind, such as routers."""
    if _kind(step) == "attention":
        return {name: module for name, module in _modules(network).items() if not isinstance(module, Layer | QuantLinear)}
    if not step.has("targets"):
        return _modules(network)
    return {
        name: module
        for name, module in _modules(network).items()
        if isinstance(module, Layer | QuantLinear) or (option == "ignore" and next(module.parameters(recurse=False), None) is not None)
    }


def _advice(network: Network, pattern: str, names: Sequence[str]) -> str:
    """Names that the pattern may have meant, else those that there are."""
    kinds = list(dict.fromkeys(map(kind_of, names)))
    known = f"names are like {', '.join(kinds[:_SHOWN])}{', ...' if len(kinds) > _SHOWN else ''}"
    if pattern.startswith("re:"):
        return f", from the start of its name; {known}"
    above = next((name for name, module in _modules(network).items() if matches(name, (pattern,), module)), None)
    if above is not None:
        inside = f"{pattern}.*" if above == pattern or "*" in pattern else f"*.{pattern}.*"
        return f"; {above} is a module with layers in it: write {inside!r} for those"
    parts = {part for name in names for part in name.split(".")}
    wrong = next((part for part in pattern.split(".") if part not in parts and not set(part) & set("*?[")), "")
    near = [*get_close_matches(wrong, parts, n=3, cutoff=0.5), *sorted(part for part in parts if wrong and part.startswith(wrong))]
    meant = [pattern.replace(wrong, part) for part in dict.fromkeys(near)]
    meant = [other for other in meant if any(matches(name, (other,)) for name in names)]
    return f"; did you mean {' or '.join(meant)}?" if meant else f"; {known}"
