"""Candidates of a search: all policies of a kind or those that are named, with the options that were set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aerogel import catalog
from aerogel.errors import AerogelError, nearest
from aerogel.recipe import build, options_of

Chosen = dict[str, tuple[type, Mapping[str, Any]]]
"""By name the policy's class and the options that were set."""


def chosen(unfit: Callable[[type], str], only: Sequence[str], overrides: Iterable[str]) -> Chosen:
    """The policies to compare; `unfit` says why a class is none of them, and nothing where it is; `overrides` are `policy.option=value`.

    Raises AerogelError for a name that no such policy bears, and for unknown options and wrong values.
    """
    classes = {name: catalog.find("methods", name) for name in only or catalog.names("methods")}
    if wrong := [f"{name} {unfit(cls)}" for name, cls in classes.items() if only and unfit(cls)]:
        raise AerogelError(f"{wrong[0]}; leave it out")
    fitting = {name: cls for name, cls in classes.items() if not unfit(cls)}
    options = options_of(overrides, "policy.option=value, for example harmonica.search=400")
    if unused := [name for name in options if name not in fitting]:
        raise AerogelError(f"an option of {unused[0]!r} is set, but that policy is not tried{nearest(unused[0], fitting)}")
    for name, given in options.items():
        build(fitting[name], given, f"policy {name!r}")
    return {name: (cls, options.get(name, {})) for name, cls in fitting.items()}
