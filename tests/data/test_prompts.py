"""Prompts are the lines of a file of text, or a column of records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from aerogel.data import prompts
from aerogel.errors import AerogelError

WANTED = ("a boot", "a bag, red")


def test_every_source_of_prompts(tmp_path: Path) -> None:
    rows = [{"Prompt": prompt, "n": number} for number, prompt in enumerate(WANTED)]
    table = Dataset.from_list(rows)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa boot\r\n\n a bag, red \n")
    (tmp_path / "a").write_text("a boot\na bag, red")
    (tmp_path / "a.json").write_text(json.dumps(list(WANTED)))
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.txt", "a", "a.json", "a.jsonl", "a.csv", "a.parquet", "saved"):
        assert prompts.read(str(tmp_path / name)) == WANTED, name
    assert prompts.read(list(WANTED)) == prompts.read(table) == WANTED
    assert prompts.read([{"caption": "x", "text": "y", "other": "z"}]) == ("x",)
    assert prompts.read([{"caption": "x", "text": "y", "other": "z"}], "other") == ("z",)


def test_lines_and_strings_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a boot")
    (tmp_path / "a.json").write_text(json.dumps(["a boot"]))
    for name in ("a.txt", "a.json"):
        with pytest.raises(AerogelError, match=rf"{name}.* is plain text without columns; leave out the column 'body'"):
            prompts.read(str(tmp_path / name), "body")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no prompt found; expected one prompt per line, or in each record"),
        (b'{"a": "b"}', r"line 1 has no column prompt; its columns are a: name one \(--column"),
        (b'{"prompt": 5}', "line 1: column 'prompt' holds int, expected a prompt"),
        (b"5", "line 1 holds int, expected an object with a prompt, or a string"),
        (b'{"prompt": "\xe9"}', "line 1 is not UTF-8"),
        (b'{"prompt": "\\ud800"}', "line 1 has half of a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_one_line(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(AerogelError, match=complaint):
        prompts.read(tmp_path / "a.jsonl")


def test_pipes_and_endless_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(AerogelError, match="is no regular file"):
        prompts.read(tmp_path / "a.txt")
    monkeypatch.setattr(prompts, "MOST", 3)
    (tmp_path / "b.txt").write_text("a bag\n" * 9)
    with pytest.warns(UserWarning, match="is read up to its first 3 prompts"):
        assert prompts.read(tmp_path / "b.txt") == ("a bag",) * 3
