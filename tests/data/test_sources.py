"""Sources by name, folder, hub and in Python; the folders are read as the datasets library itself reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import httpx2
import pandas
import pyarrow
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub import HfApi, errors
from torch.utils.data import DataLoader

from aerogel.data import chats, given, sources, text
from aerogel.errors import AerogelError
from tests.words import tokenizer

ROWS = [{"text": "the world", "n": 1}, {"text": "our people", "n": 2}, {"text": "war", "n": 3}]


def texts(source: Any, column: str | None = None) -> list[str]:
    return text.documents(source, tokenizer(chat=True), column)


@pytest.fixture
def table() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize(
    "layout", ["{split}-00000-of-00001.{form}", "data/{split}-0.{form}", "{split}/rows.{form}", "deep/{split}/0.{form}"]
)
def test_a_folder_is_read_as_the_library_reads_it(form: str, layout: str, table: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for split, rows in (("train", table), ("test", table.select([0]))):
        path = folder / layout.format(split=split, form=form)
        path.parent.mkdir(parents=True, exist_ok=True)
        {"parquet": rows.to_parquet, "jsonl": rows.to_json, "csv": rows.to_csv}[form](path)
    (folder / "README.md").write_text("What it is.")
    theirs = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert [record.value["text"] for record in sources.records(folder)] == theirs["text"] == [row["text"] for row in ROWS]


def test_shards_follow_each_other_by_name(table: Dataset, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        table.select([number]).to_parquet(tmp_path / f"{number:05}.parquet")
    assert texts(tmp_path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "is not a folder saved by datasets .* and has no data files in it; give a .txt, .jsonl"),
        (["README.md", "model.safetensors", "requirements.txt", ".hidden.jsonl"], "has no data files"),
        (["config.json", "tokenizer.json"], "is the folder of a model, not of data"),
        (["test.jsonl", "validation.jsonl"], "has no split called train; give one of its files: .*test.jsonl, .*validation.jsonl"),
        (["a/rows.jsonl", "b/rows.jsonl"], "has data files in several folders; give one of them: .*/a, .*/b"),
        (["a.jsonl", "b.csv"], "has data files in several formats; give one of them: .csv, .jsonl"),
        (["train.jsonl", "old/train.jsonl"], "has data files in several folders"),
    ],
)
def test_a_folder_in_which_several_things_could_be_meant(names: list[str], complaint: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(AerogelError, match=complaint):
        texts(tmp_path)


def test_folders_are_not_searched_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MOST_ENTRIES", 20)
    for number in range(30):
        (tmp_path / f"{number}.dat").touch()
    with pytest.raises(AerogelError, match="more than 20 files and folders"):
        texts(tmp_path)


def test_a_pipe_in_a_folder_or_by_name_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    for source in (tmp_path, tmp_path / "train.jsonl", "/dev/zero"):
        with pytest.raises(AerogelError, match="is no regular file"):
            texts(source)


def test_saved_folders_that_are_damaged_are_one_line(table: Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / "data-00000-of-00001.arrow").write_bytes(b"no")
    with pytest.raises(AerogelError, match="cannot be read as a folder saved by datasets") as caught:
        texts(tmp_path / "rows")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "none.txt", "./none", "no/such/file", "none.jsonl.gz", "a b", "", " "])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(AerogelError, match=r"no text source|is no name of a file|name of the text source is empty") as caught:
        texts(name)
    assert "\n" not in str(caught.value)


class _Hub:
    """Stands for the hub: it has one dataset, and keeps what the library is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.rows = rows
        monkeypatch.setattr(HfApi, "dataset_info", self.info)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name: str, timeout: float) -> None:
        if name == "off/line":
            raise httpx2.ConnectError("Name or service not known")
        if not name.startswith("owner/") and name != "wikitext":
            raise errors.RepositoryNotFoundError("404", response=httpx2.Response(404, request=httpx2.Request("GET", "http://hub")))

    def load(self, name: str, config: str | None, split: str, streaming: bool) -> Any:
        self.asked.append((name, config, split, streaming))
        if split == "bad":
            raise ValueError("Bad split: bad.\nAvailable splits: ['train']")
        return self.rows


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train", True)),
        ("owner/name:config", ("owner/name", "config", "train", True)),
        ("owner/name:config:test", ("owner/name", "config", "test", True)),
        ("owner/name::test", ("owner/name", None, "test", True)),
        ("owner/name:config:train[:50%]", ("owner/name", "config", "train[:50%]", False)),
        ("wikitext:wikitext-2-raw-v1:validation", ("wikitext", "wikitext-2-raw-v1", "validation", True)),
    ],
)
def test_datasets_of_the_hub(source: str, asked: tuple[Any, ...], table: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch, table.to_iterable_dataset() if asked[3] else table)
    assert texts(source) == [row["text"] for row in ROWS]
    assert hub.asked == [asked]


def test_what_the_hub_does_not_give_is_one_line(table: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking() -> Iterator[dict[str, str]]:
        yield {"text": "the"}
        raise ConnectionError("gone\naway")

    _Hub(monkeypatch, IterableDataset.from_generator(breaking))
    for source, complaint in {
        "other/name": "no text source 'other/name': no such file or folder, and as a dataset of the hub it is not there or private",
        "sotus": "is not there or private .HF_TOKEN.; did you mean sotu",
        "off/line": r"cannot be reached \(Name or service not known\); check the name and the connection",
        "owner/name::bad": r"cannot be read \(Bad split: bad. Available splits: \['train'\]\)",
        "owner/name": r"owner/name row 1 cannot be read \(gone away\)",
    }.items():
        with pytest.raises(AerogelError, match=complaint) as caught:
            texts(source)
        assert "\n" not in str(caught.value)


def test_offline_the_cache_of_the_library_is_read(table: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch, table)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert texts("off/line") == [row["text"] for row in ROWS]
    assert hub.asked == [("off/line", None, "train", False)]


def test_a_stream_without_end_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "the people"}

    monkeypatch.setattr(text, "MOST_STREAMED", 1000)
    _Hub(monkeypatch, IterableDataset.from_generator(endless))
    with pytest.warns(UserWarning, match="'owner/name' is read up to its first 1,000 characters"):
        assert len(texts("owner/name")) == 101
    assert len(text.tokens(tokenizer(), "owner/name", limit=50)) == 50
    monkeypatch.setattr(given, "MOST_STREAMED", 1000)
    with pytest.warns(UserWarning, match="given documents are read up to the first 1,000 characters"):
        assert 90 < len(given.parse(endless())) < 100


def _given() -> dict[str, Any]:
    words = [row["text"] for row in ROWS]
    table = Dataset.from_list(ROWS)
    return {
        "strings": words,
        "tuple": tuple(words),
        "records": ROWS,
        "generator": (word for word in words),
        "dataset": table,
        "formatted": table.with_format("torch"),
        "splits": DatasetDict({"test": table.select([0]), "train": table}),
        "stream": table.to_iterable_dataset(),
        "pandas": pandas.DataFrame(ROWS),
        "series": pandas.Series(words),
        "arrow": pyarrow.Table.from_pylist(ROWS),
        "loader of strings": DataLoader(words, batch_size=2),
        "loader of records": DataLoader(table, batch_size=2),
    }


@pytest.mark.parametrize("kind", _given())
def test_text_is_given_in_python(kind: str) -> None:
    source = given.parse(_given()[kind])
    assert texts(source) == texts(source) == [row["text"] for row in ROWS]
    assert sources.name_of(source) == "given data"


def test_records_given_in_python_have_columns_and_numbers() -> None:
    assert texts(given.parse([{"a": "x", "b": "y"}]), "b") == ["y"]
    assert texts(given.parse({"text": "x"})) == ["x"]
    with pytest.raises(AerogelError, match="document 1 has no text that is found by its name; its columns are a"):
        texts([{"text": "x"}, {"a": "y"}])
    with pytest.raises(AerogelError, match="given dataset has no split called train; give one of its splits: test"):
        texts(DatasetDict({"test": Dataset.from_list(ROWS)}))
    for nothing, complaint in ((5, "data is a int; expected a source by name"), ([], "the given data is empty"), (iter(()), "is empty")):
        with pytest.raises(AerogelError, match=complaint):
            given.parse(nothing)


def test_chats_of_a_column(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (tmp_path / "a.json").write_text(json.dumps([{"talk": turns, "images": []}]))
    (found,) = chats.read(tmp_path / "a.json", "talk")
    assert found.messages == turns


def test_shipped_text_wins_over_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sotu").write_text("the war")
    assert len(texts("sotu")) > 1
    assert texts("./sotu") == ["the war"]
