"""Every format of a file gives the same records; what is damaged, endless or no file is one line that names the place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from aerogel.data import files, json_arrays, sources, unpacking
from aerogel.errors import AerogelError, reasons

ROWS = [
    {"text": "the people, of the world", "n": "1"},
    {"text": 'war "and"\npeace', "n": "2"},
    {"text": "naïve – \U0001f30d\u2028 congress", "n": "3"},
]


def _csv(rows: list[dict[str, str]], delimiter: str) -> bytes:
    held = io.StringIO(newline="")
    writer = csv.DictWriter(held, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return held.getvalue().encode()


def _parquet(rows: list[dict[str, str]]) -> bytes:
    held = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), held, row_group_size=2)
    return held.getvalue()


def _arrow(rows: list[dict[str, str]], make: Callable[..., Any]) -> bytes:
    held, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with make(held, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return held.getvalue()


def _lines(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


WRITERS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "a.jsonl": _lines,
    "a.ndjson": _lines,
    "a.JSONL": _lines,
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "keyed.json": lambda rows: json.dumps({"version": "1", "data": rows}).encode(),
    "server.json": lambda rows: json.dumps({"features": [{"name": "text"}], "rows": [{"row_idx": 0, "row": row} for row in rows]}).encode(),
    "only.json": lambda rows: json.dumps({"anything": rows}).encode(),
    "lines.json": _lines,
    "a.csv": lambda rows: _csv(rows, ","),
    "a.tsv": lambda rows: _csv(rows, "\t"),
    "a.parquet": _parquet,
    "stream.arrow": lambda rows: _arrow(rows, ipc.new_stream),
    "file.arrow": lambda rows: _arrow(rows, ipc.new_file),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: bytes(pyarrow.compress(content, "zstd", asbytes=True)),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_records(name: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{packed}"
    path.write_bytes(PACKERS[packed](WRITERS[name](ROWS)))
    assert [record.value for record in files.records(path)] == ROWS
    assert all(record.place.startswith(f"{path} ") for record in files.records(path))


@pytest.mark.parametrize("packed", [packed for packed in PACKERS if packed])
def test_packed_parts_follow_each_other(packed: str, tmp_path: Path) -> None:
    """As `cat a.gz b.gz` and packers that work in parallel leave them."""
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(b"".join(PACKERS[packed](b'{"text": "%d"}\n' % number * 9000) for number in range(3)))
    assert [record.value["text"] for record in files.records(path)] == ["0"] * 9000 + ["1"] * 9000 + ["2"] * 9000


def test_cache_files_of_datasets_are_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert [record.value for record in files.records(file)] == ROWS
    assert [record.value for record in sources.records(file)] == ROWS


def test_tables_of_pandas_are_read(tmp_path: Path) -> None:
    table = pandas.DataFrame(ROWS)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.json", orient="records")
    table.to_json(tmp_path / "b.json.gz", orient="records", lines=True)
    for name in ("a.csv", "a.parquet", "a.json", "b.json.gz"):
        assert [record.value["text"] for record in files.records(tmp_path / name)] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text(encoding: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "array.json", "a.csv"):
        (tmp_path / name).write_bytes(WRITERS[name](ROWS).decode().encode(encoding))
        assert [record.value for record in files.records(tmp_path / name)] == ROWS
    (tmp_path / "a.txt").write_bytes("the\r\nwar\fpeace".encode(encoding))
    assert [record.value for record in files.records(tmp_path / "a.txt")] == ["the\nwar", "peace"]


def test_documents_are_between_form_feeds_wherever_a_chunk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the\fwar\f\fof the\nworld\f"
    (tmp_path / "a.txt").write_text(text)
    for chunk in range(1, len(text) + 2):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        assert [record.value for record in files.records(tmp_path / "a.txt")] == text.split("\f")


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xe2\x80\xa8b"}\r\n \r\n"c"\n')
    found = list(files.records(tmp_path / "a.jsonl"))
    assert [record.value for record in found] == [{"text": "a\u2028b"}, "c"]
    assert found[1].place == f"{tmp_path / 'a.jsonl'} line 3"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('{"text": ["a", "b"], "label": [0, 1]}', ["a", "b"]),
        ('{"text": "a"}', [{"text": "a"}]),
        ('{"messages": [{"role": "user", "content": "a"}]}', [{"messages": [{"role": "user", "content": "a"}]}]),
        ('{"train": ["a"], "test": ["b"]}', ["a"]),
        ('{"prompt": "a", "completion": "b"}', [{"prompt": "a", "completion": "b"}]),
        (" \n", []),
        ("[]", []),
        ("[\n]", []),
    ],
)
def test_documents_of_json(content: str, expected: list[object], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [record.value for record in files.records(tmp_path / "a.json")] == expected


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"the\nwar \xe9t\xe9", r"a\.txt line 2 is not UTF-8 text \(byte 0xe9\); convert it, .*iconv"),
        ("a.txt", b"the\nwar\x00", r"a\.txt line 2 holds a zero byte, so it is no text"),
        ("a.csv", b"text\na\x00\n", "line 2 holds a zero byte"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xe9"}', "line 3 is not UTF-8 text"),
        ("a.json", b'[\n"\xe9"]', "line 2 is not UTF-8 text"),
        ("a.csv", b"text\n\xe9\n", "line 2 is not UTF-8 text"),
        ("a.txt", b"\xff\xfea", "begins like UTF-16-LE and is not"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.json", b"[" * 100_000, "is nested too deeply"),
        ("a.json", b"[1, 2", "is not JSON"),
        ("a.json", b"5", "holds a JSON int; an array"),
        ("a.json", b'{"en": ["a"], "de": ["b"]}', "has arrays under 'en', 'de'; leave one"),
        ("a.csv", b"text,n\na,1\nb\n", "line 3 has 1 cells and the header 2"),
        ("a.csv", b"text,text\na,1\n", "line 1 names the column 'text' twice"),
        ("a.csv", b'text\n"a" b\n', "line 2 is not a row"),
        ("a.csv", b'text\n"a\n', "line 2 is not a row"),
        ("a.parquet", b"PAR1 no", r"cannot be read from row 0 on as \.parquet"),
        ("a.parquet", b"", "cannot be read from row 0"),
        ("a.txt.gz", b"plain", "is damaged or no .gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "is damaged or no .gz"),
        ("a.parquet.gz", b"\x1f\x8b", "is damaged or no .gz"),
        ("a.txt.bz2", b"plain", r"is damaged or no \.bz2"),
        ("a.txt.xz", b"plain", r"is damaged or no \.xz"),
        ("a.txt.zst", b"plain", r"is damaged or no \.zst"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n' * 99)[:-9], r"is damaged or no \.bz2 \(it is cut short"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-9], r"is damaged or no \.xz \(it is cut short"),
        ("a.jsonl.zst", PACKERS[".zst"](b'{"text": "a"}\n' * 99)[:-9], r"is damaged or no \.zst"),
        ("a.arrow", b"ARROW1 no", r"cannot be read from row 0 on as \.arrow"),
        ("a.arrow", b"", r"cannot be read from row 0 on as \.arrow"),
    ],
)
def test_damage_is_one_line(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AerogelError, match=complaint) as caught:
        list(files.records(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_damaged_columns_are_one_line_or_rows(name: str, tmp_path: Path) -> None:
    whole, complained = WRITERS[name](ROWS * 20), 0
    for position in range(4, len(whole), 97):
        (tmp_path / name).write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        found: list[object] = []
        complaints = list(reasons(lambda found=found: found.extend(files.records(tmp_path / name))))  # type: ignore[misc]
        assert all("\n" not in complaint for complaint in complaints)
        assert complaints or len(found) == 60 or name == "stream.arrow"  # which ends where a batch is said to have nothing
        complained += len(complaints)
    assert complained


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv.gz", "a.parquet"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(AerogelError, match="is no regular file"):
        list(files.records(tmp_path / name))
    with pytest.raises(AerogelError, match="is no regular file"):
        list(files.records(Path("/dev/zero")))


@pytest.mark.parametrize("packed", [".bz2", ".xz", ".zst"])
def test_a_bomb_of_another_packer_is_refused(packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_EXPANDED", 2**20)
    (tmp_path / f"a.txt{packed}").write_bytes(PACKERS[packed](b"a\n" * 2**24))
    tracemalloc.start()
    try:
        with pytest.raises(AerogelError, match="expands to more than 100 times its size"):
            list(files.records(tmp_path / f"a.txt{packed}"))
        assert tracemalloc.get_traced_memory()[1] < 2**24  # of 32 MiB
    finally:
        tracemalloc.stop()


def test_an_xz_that_asks_for_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"the war"))
    assert [record.value for record in files.records(tmp_path / "a.txt.xz")] == ["the war"]
    packed = partial(lzma.LZMADecompressor, memlimit=2**20)
    monkeypatch.setitem(unpacking.PACKED, ".xz", lambda path, file: unpacking._Streams(file, packed))
    with pytest.raises(AerogelError, match=r"is damaged or no \.xz \(Memory usage limit exceeded\)"):
        list(files.records(tmp_path / "a.txt.xz"))


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize(
    ("name", "line"), [("a.txt.gz", b"a" * 2**20), ("a.jsonl.gz", b'"' + b"a" * 2**20), ("a.parquet.gz", b"a" * 2**20)]
)
def test_a_bomb_is_refused_before_it_fills_memory(
    name: str, line: bytes, lying: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "_EXPANDED", 2**22)
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        for _ in range(128):
            file.write(line)
    if lying:
        with (tmp_path / name).open("r+b") as raw:
            raw.seek(-4, os.SEEK_END)
            raw.write(bytes(4))
    tracemalloc.start()
    try:
        with pytest.raises(AerogelError, match="expands to more than 100 times its size"):
            list(files.records(tmp_path / name))
        assert tracemalloc.get_traced_memory()[1] < 2**26  # of 128 MiB
    finally:
        tracemalloc.stop()


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "LONGEST", 1000)
    (tmp_path / "a.jsonl").write_text('"a"\n' + "b" * 5000)
    with pytest.raises(AerogelError, match="line 2 has 1,000 characters or more"):
        list(files.records(tmp_path / "a.jsonl"))
    monkeypatch.setattr(files, "_WHOLE", 1000)
    (tmp_path / "a.json").write_text(json.dumps({"data": ["a" * 2000]}))
    with pytest.raises(AerogelError, match="an object of over 1,000 characters, which is read at once"):
        list(files.records(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('{"text": "a"}\n' * 200)
    assert len(list(files.records(tmp_path / "a.json"))) == 200
    monkeypatch.setattr(files, "_CHUNK", 100)
    monkeypatch.setattr(files, "_DOCUMENT", 1000)
    (tmp_path / "a.txt").write_text("a" * 5000)
    with pytest.raises(AerogelError, match="document 1 has over 1,000 characters"):
        list(files.records(tmp_path / "a.txt"))


def test_a_stream_is_read_no_further_than_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 5000 + "damaged")
    found = files.records(tmp_path / "a.jsonl")
    assert next(found).value == {"text": "a"}
    found.close()  # type: ignore[attr-defined]


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AerogelError, match=r"a\.jsonl cannot be read: Permission denied"):
        list(files.records(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "a.jsonl.zst"])
def test_without_pyarrow(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(AerogelError, match=r"needs the pyarrow package: pip install 'aerogel\[datasets\]'"):
        list(files.records(tmp_path / name))


def test_an_array_is_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": 'a"\\\u00e9\n'}, -12.5e3, "", True, None, [1, {"b": []}], "\U0001f30d" * 9, 7]
    for text in (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False) + "\n\n", "  [ ]", '["a"\t,"b"]'):
        (tmp_path / "a.json").write_text(text, "utf-8")
        for chunk in (1, 2, 3, 7, 50, 2**20):
            monkeypatch.setattr(json_arrays, "_CHUNK", chunk)
            assert list(json_arrays.items(tmp_path / "a.json")) == json.loads(text)


def test_memory_holds_an_item_and_not_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "_CHUNK", 2**14)
    monkeypatch.setattr(files, "_CHUNK", 2**14)
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": "a" * 1000, "n": number}) for number in range(3000)) + "]")
    tracemalloc.start()
    try:
        assert sum(record.value["n"] for record in files.records(tmp_path / "a.json")) == sum(range(3000))
        assert tracemalloc.get_traced_memory()[1] < 2**19  # of 3 MB
    finally:
        tracemalloc.stop()


@given(st.text('[]{},:"\\1e-tn u', max_size=40), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_an_array_is_read_as_json_reads_it(tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int) -> None:
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_text("[" + text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_CHUNK", chunk)
        found: list[object] = []
        complaints = list(reasons(lambda: found.extend(json_arrays.items(path))))
    try:
        expected = json.loads("[" + text)
    except ValueError:
        assert len(complaints) == 1
        assert "\n" not in complaints[0]
    else:
        assert (found, complaints) == (expected, [])


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(
    st.lists(st.fixed_dictionaries({"text": cells, "n": cells}), min_size=1, max_size=5),
    st.sampled_from(sorted(WRITERS)),
    st.sampled_from(sorted(PACKERS)),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], name: str, packed: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"{name}{packed}"
    path.write_bytes(PACKERS[packed](WRITERS[name](rows)))
    assert [record.value for record in files.records(path)] == rows


@given(st.binary(max_size=200), st.sampled_from([*files.FORMATS, *(f".jsonl{packed}" for packed in unpacking.PACKED)]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_records_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{ending}"
    path.write_bytes(content)
    assert all("\n" not in complaint for complaint in reasons(lambda: list(files.records(path))))
