"""How figures travel: a benchmark writes one JSON, and the docs take their tables from it.

python benchmarks/results.py          # put every table and image into docs/ anew
python benchmarks/results.py --check  # exit 1 when a page does not show what was measured
"""

from __future__ import annotations

import json
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import plots

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def write(name: str, title: str, settings: dict[str, Any], columns: list[str], rows: list[list[Any]], notes: list[str]) -> Path:
    """Write benchmarks/results/NAME.json: a table, the settings it was measured under, and what a reader must know."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    document = {
        "title": title,
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "settings": settings,
        "columns": columns,
        "rows": rows,
        "notes": notes,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def machine() -> dict[str, Any]:
    """The processor and the versions that figures depend on."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return {
        "processor": cpu[1] if cpu else platform.processor(),
        "python": platform.python_version(),
        **{package: found for package in ("torch", "transformers", "compressed-tensors") if (found := _version(package))},
    }


def table(document: dict[str, Any]) -> str:
    """A results document as Markdown: the table, then its settings and notes in small type."""
    head = "| " + " | ".join(document["columns"]) + " |\n|" + "---|" * len(document["columns"]) + "\n"
    body = "".join("| " + " | ".join(_cell(value) for value in row) + " |\n" for row in document["rows"])
    settings = ", ".join(f"{key} {value}" for key, value in {**document["settings"], **document["machine"]}.items())
    notes = "".join(f"\n- {note}" for note in document["notes"])
    return f"**{document['title']}**\n\n{head}{body}\n<small>{document['measured']}: {settings}.</small>\n{notes}\n"


def drawing(name: str) -> Path:
    """Where the image of a results document lies."""
    return ROOT / "docs" / "images" / "figures" / f"{name}.svg"


def fill(text: str) -> str:
    """The page with every marked table as it was last measured, and its image above it."""

    def replace(match: re.Match[str]) -> str:
        path = FOLDER / f"{match['name']}.json"
        if not path.exists():
            return match[0]
        document = json.loads(path.read_text())
        image = f"![{document['title']}](images/figures/{match['name']}.svg)\n\n" if drawing(match["name"]).exists() else ""
        return f"{match[1]}{image}{table(document)}{match[3]}"

    return MARK.sub(replace, text)


def pages() -> list[Path]:
    """Every page that may show figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Fill or check the pages; images are drawn when they are filled."""
    if "--check" not in sys.argv:
        for name in plots.PLOTS:
            plots.draw(name, json.loads((FOLDER / f"{name}.json").read_text()), drawing(name))
    stale = [page for page in pages() if page.exists() and fill(page.read_text()) != page.read_text()]
    if "--check" in sys.argv:
        print(*(f"{page.relative_to(ROOT)} does not show the last figures; run python benchmarks/results.py" for page in stale), sep="\n")
        return bool(stale)
    for page in stale:
        page.write_text(fill(page.read_text()))
        print(f"filled {page.relative_to(ROOT)}")
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
