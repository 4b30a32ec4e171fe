"""Selection of modules by globs, `re:` patterns, names and class names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from aerogel.errors import AerogelError


def matches(name: str, patterns: Iterable[str], module: nn.Module | None = None) -> bool:
    """Return True if one of the patterns selects this module.

    A pattern is `re:` and a regular expression that matches from the start of the dotted name, or a glob on the whole dotted
    name (`*` spans dots), or a plain name (the whole dotted name or its last parts, never a part of a word), or the
    module's class name. Raises AerogelError for what is no regular expression.
    """
    return any(_match(name, pattern, module) for pattern in patterns)


def _match(name: str, pattern: str, module: nn.Module | None) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise AerogelError(f"pattern {pattern!r} is not a regular expression ({error})") from error
    if any(sign in pattern for sign in "*?["):
        return fnmatchcase(name, pattern)
    if module is not None and type(module).__name__ == pattern:
        return True
    return names_exactly(name, pattern)


def names_exactly(name: str, pattern: str) -> bool:
    """Return True if the pattern is this name, whole or its last parts, without any wildcard."""
    return name == pattern or name.endswith("." + pattern)
