"""Selection of modules by globs, `re:` patterns, names and class names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import regex
from torch import nn

from aerogel.errors import AerogelError

_PATIENCE = 1.0
"""Seconds."""


def matches(name: str, patterns: Iterable[str], module: nn.Module | None = None) -> bool:
    """Return True if one of the patterns selects this module.

    A pattern is `re:` and a regular expression that matches from the start of the dotted name, or a glob on the whole dotted
    name (`*` spans dots), or a plain name (the whole dotted name or its last parts, never a part of a word), or the
    module's class name. Raises AerogelError for what is no regular expression.
    """
    return any(_match(name, pattern, module) for pattern in patterns)


def _match(name: str, pattern: str, module: nn.Module | None) -> bool:
    if pattern.startswith("re:"):
        return found_at_start(pattern, name)
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    if module is not None and type(module).__name__ == pattern:
        return True
    return names_exactly(name, pattern)


def found_at_start(pattern: str, name: str) -> bool:
    """Return True if a `re:` pattern matches from the start of a name.

    Patterns come with models and recipes, and some take ages: `re:(a+)+$` doubles its time with every letter of a name. Raises AerogelError
    for what is no regular expression, and for one that takes longer than a second; others take millionths.
    """
    try:
        return regex.match(pattern[3:], name, timeout=_PATIENCE) is not None
    except TimeoutError as error:
        raise AerogelError(f"pattern {pattern!r} takes too long on {name!r}; write it without repetitions inside of repetitions") from error
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise AerogelError(f"pattern {pattern!r} is not a regular expression ({error})") from error


def names_exactly(name: str, pattern: str) -> bool:
    """Return True if the pattern is this name, whole or its last parts, without any wildcard."""
    return name == pattern or name.endswith("." + pattern)
