"""Cards: the text that `aerogel list` and `aerogel show` print about a method, recipe, family, exporter or measure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from aerogel import catalog
from aerogel.errors import AerogelError, nearest
from aerogel.io.reference import REFERENCES
from aerogel.recipe import Recipe, plain

MODELS = "models"


def summaries(kind: str) -> dict[str, str]:
    """Return one line for each name of a kind, without importing any of them."""
    if kind == MODELS:
        return {name: f"{packaged.file.rpartition('/')[2]} ({packaged.licence})" for name, packaged in REFERENCES.items()}
    return {name: catalog.card(kind, name).summary for name in catalog.names(kind)}


def show(name: str) -> list[dict[str, Any]]:
    """Return the cards of everything with this name; raises AerogelError with the nearest names when there is none."""
    cards = [_card(kind, name) for kind in catalog.KINDS if name in catalog.names(kind)]
    if not cards:
        known = {known for kind in catalog.KINDS for known in catalog.names(kind)}
        raise AerogelError(f"nothing is called {name!r}{nearest(name, known)}")
    return cards


def as_text(card: Mapping[str, Any]) -> str:
    """Return a card as text."""
    lines = [f"{card['name']} ({card['kind']})", "", card["about"]]
    if card.get("requires"):
        lines += ["", f"requires: {', '.join(card['requires'])}"]
    for number, step in enumerate(card.get("steps", []), 1):
        for method, options in step.items():
            lines += ["", f"{number}. {method}", *(f"    {option}: {value!r}" for option, value in options.items())]
    for option in card.get("options", []):
        lines += ["", f"{option['name']}: {option['type']}{_default(option)}", f"    {option['about']}"]
    lines += ["", f"file: {card['file']}"]
    return "\n".join(lines)


def _default(option: Mapping[str, Any]) -> str:
    return f" = {option['default']!r}" if "default" in option else ", must be given"


def _card(kind: str, name: str) -> dict[str, Any]:
    found = catalog.card(kind, name)
    card: dict[str, Any] = {"name": name, "kind": kind, "about": found.summary, "file": str(found.path)}
    if kind == "recipes":
        return card | {"steps": Recipe.parse(name).as_dict()["steps"]}
    member = catalog.find(kind, name)
    docs = [inspect.getdoc(inspect.getmodule(member)) if inspect.isclass(member) else found.summary, inspect.getdoc(member)]
    if kind == "families":
        return card | {field.name: plain(getattr(member, field.name)) for field in fields(member) if field.name != "name"}
    card["about"] = "\n\n".join(doc for doc in docs if doc)
    if hasattr(member, "requires"):
        # The requirements may depend on the options; a card shows those of the defaults.
        card["requires"] = sorted(member().requires if isinstance(member.requires, property) else member.requires)
    if is_dataclass(member):
        card["options"] = [_option(option) for option in catalog.options(member)]
    return card


def _option(option: catalog.Option) -> dict[str, Any]:
    default = {} if option.default is MISSING else {"default": plain(option.default)}
    return {"name": option.name, "type": option.type, "about": option.doc, **default}
