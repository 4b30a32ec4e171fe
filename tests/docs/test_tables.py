"""The docs show what the code has: tables are current, every method has a page, pages are reachable."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from aerogel import catalog

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load(name: str) -> ModuleType:
    """A script of the docs, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current() -> None:
    stale = [str(page.relative_to(DOCS)) for page in load("tables").stale()]
    assert not stale, f"{stale} do not show what the code has: run python docs/tables.py"


@pytest.mark.parametrize("method", catalog.names("methods"))
def test_every_method_has_a_page_with_its_options(method: str) -> None:
    page = DOCS / "methods" / f"{method}.md"
    assert page.is_file(), f"write {page.relative_to(DOCS.parent)}; docs/methods/rotate.md is an example"
    text = page.read_text("utf-8")
    assert text.startswith(f"# {method}\n")
    assert "<!-- options -->" in text


def test_no_page_is_about_a_method_that_is_gone() -> None:
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} - {"index"} <= set(catalog.names("methods"))


def test_a_table_says_every_knob(tmp_path: Path) -> None:
    page = tmp_path / "rtn.md"
    page.write_text("# rtn\n<!-- options -->\nold\n<!-- /options -->\nafter\n<!-- list: measures -->\n<!-- /list -->\n")
    filled = load("tables").fill(page)
    options = catalog.options(catalog.find("methods", "rtn"))
    assert all(f"| `{option.name}` |" in filled for option in options)
    assert "old" not in filled
    assert "\nafter\n" in filled
    assert "| `perplexity` |" in filled
    assert '| `ignore` | `["lm_head"]` |' in filled


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[\w-]+)?\)", page.read_text("utf-8")):
            assert (page.parent / target).is_file(), f"{page.relative_to(DOCS)} links to {target}"


def test_the_navigation_lists_every_page() -> None:
    site = load("site")
    assert {page.name for page in DOCS.glob("*.md")} <= set(site.PAGES.values()), "a page that nobody can reach: list it in docs/site.py"


def test_formulas_become_mathml() -> None:
    site = load("site")
    drawn = site.on_page_content('<p><span class="arithmatex">\\(a &lt; b^\\top\\)</span></p><div class="arithmatex">\\[x\\]</div>')
    assert drawn.count("<math") == 2
    assert "arithmatex" not in drawn
    assert 'display="block"' in drawn
    assert "<mo>&#x0003C;</mo>" in drawn, "what was escaped is still"
