"""Prompts of diffusion models: the lines of a text file, or a column of records."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from aerogel.data import files, sources
from aerogel.data.files import Record, require_unicode
from aerogel.data.unpacking import lines
from aerogel.errors import AerogelError

COLUMNS = ("prompt", "caption", "text")
"""Columns with a prompt, in any case of letters, the likelier first."""
MOST = 2**16
"""Prompts that are read at most."""


def read(source: Any, column: str | None = None) -> tuple[str, ...]:
    """Return the prompts of a source: one on each line of a file of text, else one in each record.

    Raises AerogelError when there is no such source, a record has no prompt, or there is none at all.
    """
    prompts = tuple(islice((prompt for line in _lines(source, column) if (prompt := line.strip())), MOST + 1))
    if not prompts:
        raise AerogelError(f"{sources.name_of(source)}: no prompt found; expected one prompt per line, or in each record")
    if len(prompts) > MOST:
        warnings.warn(f"{sources.name_of(source)} is read up to its first {MOST:,} prompts", stacklevel=2)
    return prompts[:MOST]


def _lines(source: Any, column: str | None) -> Iterator[str]:
    if sources.is_named(source) and not sources.is_streamed(source):
        path = Path(source)
        if not path.is_dir() and files.format_of(path) == ".txt":
            _require_no_column(column, str(source))
            return lines(path)
    return (require_unicode(_prompt(record, column), record.place) for record in sources.records(source))


def _prompt(record: Record, column: str | None) -> str:
    value, place = record
    if isinstance(value, str):
        _require_no_column(column, place)
        return value
    if not isinstance(value, Mapping):
        raise AerogelError(f"{place} holds {type(value).__name__}, expected an object with a prompt, or a string")
    names = [str(name) for name in value]
    found = column if column is not None else next((name for known in COLUMNS for name in names if name.lower() == known), None)
    if found is None or found not in value:
        wanted = "prompt" if column is None else repr(column)
        raise AerogelError(f"{place} has no column {wanted}; its columns are {', '.join(names)}: name one (--column, or column= in Python)")
    if not isinstance(value[found], str | None):
        raise AerogelError(f"{place}: column {found!r} holds {type(value[found]).__name__}, expected a prompt")
    return value[found] or ""


def _require_no_column(column: str | None, place: str) -> None:
    if column is not None:
        raise AerogelError(f"{place} is plain text without columns; leave out the column {column!r}")
