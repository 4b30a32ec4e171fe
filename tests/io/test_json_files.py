"""JSON that users give is an object, or one error that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aerogel.errors import AerogelError
from aerogel.io.json_files import parse_json, read_object


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply to be read"),
        (b"[1]", "holds a JSON array, expected an object"),
        (b'"x"', "holds a JSON string, expected an object"),
        (b"null", "holds a JSON null, expected an object"),
        (b"true", "holds a JSON boolean, expected an object"),
    ],
)
def test_what_is_no_object_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(AerogelError, match=rf"config\.json {told}.*; get it again$"):
        read_object(path, "get it again")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"config\.json is missing; fetch or copy the file again"):
        read_object(tmp_path / "config.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AerogelError, match="pipe is no regular file"):
        read_object(tmp_path / "pipe")
    with pytest.raises(AerogelError, match="is no regular file"):
        read_object(tmp_path)


def test_objects_and_other_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": [1]}', "utf-8")
    assert read_object(tmp_path / "a.json") == {"é": [1]}
    assert parse_json("[1, 2]", "line 1", "") == [1, 2]
