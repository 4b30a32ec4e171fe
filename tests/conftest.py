"""Fixtures that several folders of tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from aerogel import catalog


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package of a third party, announced by an entry point; put files into its folders."""
    root = tmp_path / "site" / "thirdparty"
    for folder in (root, root / "methods", root / "recipes"):
        folder.mkdir(parents=True)
    for package in (root, root / "methods"):
        (package / "__init__.py").write_text("")
    entry = EntryPoint("mine", "thirdparty", catalog.PLUGINS)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry] if group == catalog.PLUGINS else [])
    monkeypatch.syspath_prepend(root.parent)
    _forget()
    yield root
    _forget()


def _forget() -> None:
    for cached in (catalog._cards, catalog._houses):
        cached.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "thirdparty"]:
        del sys.modules[module]
