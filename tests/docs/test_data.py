"""The page about data names every format and column that the code reads, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import aerogel
from aerogel.data import files, records, text
from aerogel.data.sources import SHIPPED
from aerogel.data.unpacking import LONGEST
from tests.folders import model_folder

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def test_every_format_and_column_is_on_the_page() -> None:
    columns = (*records.CHATS, *records.TEXTS, *records.ASKED, *records.ANSWERED)
    assert [name for name in (*files.FORMATS, ".gz", *SHIPPED, *columns) if f"`{name}`" not in PAGE] == []


def test_limits_are_those_of_the_code() -> None:
    for limit in (text.MOST_STREAMED, text.MOST_CHARACTERS, LONGEST, files._WHOLE):
        assert f"{limit / 1e6:,.0f} million" in PAGE


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = aerogel.load(model_folder(tmp_path / "model"), lazy=False)
    monkeypatch.setattr(aerogel, "load", lambda name, lazy: model)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(example, "data.md", "exec"), found)
    assert found["documents"]
