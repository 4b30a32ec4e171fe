"""Tables of the docs that come from the code: `python docs/tables.py` fills them in, a test checks that they are current.

    <!-- options -->                        the options of the method that the page is named after
    <!-- options: measures/perplexity -->   those of anything else with options
    <!-- list: recipes -->                what there is of one kind, with one line on each

Each ends with `<!-- /options -->` or `<!-- /list -->`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from aerogel import catalog
from aerogel.recipe import plain

DOCS = Path(__file__).resolve().parent
MARK = re.compile(r"(<!-- (?P<what>options|list)(?:: (?P<kind>\w+)(?:/(?P<name>\w+))?)? -->\n).*?(<!-- /(?P=what) -->)", re.DOTALL)


def fill(page: Path) -> str:
    """Return the page's text with every marked table as the code has it now."""

    def replace(match: re.Match[str]) -> str:
        table = listed(match["kind"], page) if match["what"] == "list" else options(match["kind"] or "methods", match["name"] or page.stem)
        return f"{match[1]}\n{table}\n{match[5]}"  # Markdown wants air around a table

    return MARK.sub(replace, page.read_text("utf-8"))


def options(kind: str, name: str) -> str:
    """Return the table of the options of one thing."""
    rows = [
        f"| `{option.name}` | {_default(option.default)} | {_cell(option.doc)} |\n" for option in catalog.options(catalog.find(kind, name))
    ]
    return "".join(["| option | default | what it does |\n|---|---|---|\n", *rows])


def listed(kind: str, page: Path) -> str:
    """Return the table of all names of a kind; a name that a page beside this one is about is linked to it."""
    rows = []
    for name in catalog.names(kind):
        shown = f"[`{name}`]({name}.md)" if page.with_name(f"{name}.md").exists() else f"`{name}`"
        rows.append(f"| {shown} | {_cell(catalog.card(kind, name).summary)} |\n")
    return "".join(["| name | what it is |\n|---|---|\n", *rows])


def stale() -> list[Path]:
    """Return the pages whose tables are not current."""
    return [page for page in sorted(DOCS.rglob("*.md")) if fill(page) != page.read_text("utf-8")]


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    written = plain(value)
    return f"`{written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for changed in stale():
        changed.write_text(fill(changed), "utf-8")
        print(f"filled {changed.relative_to(DOCS.parent)}")
