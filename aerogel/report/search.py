"""The report of a search: one self-contained HTML file from search.json, and its table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from aerogel.errors import AerogelError
from aerogel.io.json_files import read_object
from aerogel.io.older import upgraded_search
from aerogel.io.record.files import checked, require_known
from aerogel.io.text_files import replace_text
from aerogel.report import cache_search, skip_search, sparsity_search, structured_search, token_search
from aerogel.report.page import HERE, provenance
from aerogel.report.svg import PALETTE

FILE = "search.json"
_KINDS: Mapping[str, Any] = {
    "cache": cache_search, "skip": skip_search, "tokens": token_search, "sparsity": sparsity_search, "structured": structured_search
}  # fmt: skip


class Row(NamedTuple):
    """A line of the terminal's table."""

    cells: tuple[str, ...]
    best: bool


class Told(NamedTuple):
    """A search in words."""

    columns: tuple[str, ...]
    """The first two are words, the others numbers."""
    rows: list[Row]
    left_out: list[tuple[str, str]]
    """Policies, and why."""
    sentences: tuple[str, str]


def told(facts: Mapping[str, Any]) -> Told:
    """Summary of a search for a terminal."""
    kind, found = _read(facts)
    rows = [Row(line.cells, line.best) for line in kind.lines(found)]
    return Told(kind.columns(found), rows, [(one.policy, one.reason) for one in found.left_out], (kind.headline(found), kind.lead(found)))


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report on a search's folder, to report.html in it unless told otherwise, and return its path.

    Raises AerogelError when the folder holds no readable record.
    """
    record = Path(folder) / FILE
    facts = read_object(record, "give a folder that `aerogel search` wrote")
    target = Path(path) if path else Path(folder) / "report.html"
    return replace_text(target, page(facts, record))


def page(facts: Mapping[str, Any], path: str | Path = FILE) -> str:
    """Return the report on a search; raises AerogelError that names a field which is not as it should be."""
    kind, found = _read(facts, path)
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, loader=loader)
    css = PALETTE + (HERE / "style.css").read_text("utf-8")
    return environment.get_template(
        kind.TEMPLATE
    ).render(
        css=Markup(css),  # noqa: S704  # our own files
        date=(found.provenance.date or "")[:10],
        version=found.provenance.versions.get("aerogel"),
        headline=kind.headline(found),
        lead=kind.lead(found),
        left_out=found.left_out,
        provenance=list(provenance(found.provenance, found.timings)),
        glossary=kind.GLOSSARY,
        **kind.context(found),
    )


def _read(facts: Mapping[str, Any], path: str | Path = FILE) -> tuple[Any, Any]:
    """The kind of search, and its record."""
    require_known(facts, path)
    task = str(facts.get("task"))
    if task not in _KINDS:
        raise AerogelError(f"{path} is of the search {task!r}, which this version does not know: {', '.join(_KINDS)}")
    kind = _KINDS[task]
    return kind, checked(kind.Search, upgraded_search(facts), path, "aerogel search")
