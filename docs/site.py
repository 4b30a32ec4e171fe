"""Site hooks: navigation from the folder, and formulas as MathML, which browsers render without a script."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

PAGES = {
    "Home": "index.md",
    "Quickstart": "quickstart.md",
    "Recipes": "recipes.md",
    "Data": "data.md",
    "Methods": "methods",
    "Evaluation": "evaluation.md",
    "Saving and exporting": "export.md",
    "Diffusion": "diffusion.md",
    "MoE models": "moe.md",
    "Fewer tokens": "tokens.md",
    "Weight sparsity": "sparsity.md",
    "Models": "models.md",
    "Speed": "speed.md",
    "Figures": "figures.md",
    "Architecture": "architecture.md",
    "Adding a method": "adding-a-method.md",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """List the pages there are; a folder becomes a section."""
    root = Path(config.docs_dir)
    config.nav = [{title: _entry(root, path)} for title, path in PAGES.items() if (root / path).exists()]
    return config


def on_page_content(content: str, **_: Any) -> str:
    """Turn every formula into MathML."""
    return FORMULA.sub(_mathml, content)


def _entry(root: Path, path: str) -> Any:
    if not (root / path).is_dir():
        return path
    pages = sorted((root / path).glob("*.md"), key=lambda page: (page.stem != "index", page.stem))
    return [f"{path}/{page.name}" if page.stem == "index" else {page.stem: f"{path}/{page.name}"} for page in pages]


def _mathml(match: re.Match[str]) -> str:
    return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
