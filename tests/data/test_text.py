"""Text samples against a literal reading of the rule in the file's docstring."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from aerogel.data import text
from aerogel.errors import AerogelError
from tests.words import tokenizer


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the people of the world\fpeace and war\f \f" + "we in congress " * 40)
    return path


def test_stream_is_documents_with_an_end_behind_each(book: Path) -> None:
    ids = text.tokens(tokenizer(), book).tolist()
    assert ids[:10] == [3, 14, 4, 3, 18, 1, 17, 5, 16, 1]
    assert len(ids) == 6 + 4 + 121
    assert ids[-1] == 1
    assert ids.count(1) == 3


@pytest.mark.parametrize("limit", [1, 5, 6, 7, 10, 11, 500])
def test_a_limit_gives_the_start_of_the_stream(book: Path, limit: int) -> None:
    assert text.tokens(tokenizer(), book, limit).tolist() == text.tokens(tokenizer(), book).tolist()[:limit]


def test_no_end_token_when_the_tokenizer_has_none(book: Path) -> None:
    assert text.tokens(tokenizer(eos=False), book).tolist()[:7] == [3, 14, 4, 3, 18, 17, 5]


def test_samples_do_not_overlap_and_repeat_by_seed(book: Path) -> None:
    stream = text.tokens(tokenizer(), book)
    windows = {tuple(stream[start : start + 16].tolist()) for start in range(0, len(stream) - 15, 16)}
    drawn = text.samples(tokenizer(), book, count=8, length=16, seed=3)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (8, 16)
    assert {tuple(row) for row in drawn.tolist()} == windows
    assert torch.equal(drawn, text.samples(tokenizer(), book, count=8, length=16, seed=3))
    assert not torch.equal(drawn, text.samples(tokenizer(), book, count=8, length=16, seed=4))


def test_a_tokenizer_that_opens_texts_opens_every_sequence(book: Path) -> None:
    opened = text.samples(tokenizer(bos=True), book, count=3, length=16)
    assert opened.shape == (3, 16)
    assert opened[:, 0].tolist() == [2, 2, 2]
    assert (opened[:, 1:] != 2).all()


def test_too_little_text_says_how_much_is_missing(book: Path) -> None:
    with pytest.raises(AerogelError, match=r"has 131 tokens, one sequence needs 512; give more text or a shorter length"):
        text.samples(tokenizer(), book)
    with pytest.warns(UserWarning, match="gives 2 of the 5 sequences of 64 tokens"):
        assert text.samples(tokenizer(), book, count=5, length=64).shape == (2, 64)


def test_json_lines_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    chat = {"messages": [{"role": "a", "content": "the war"}, {"role": "we", "content": "peace"}]}
    path.write_text(json.dumps({"text": "our world"}) + "\n\n" + json.dumps(chat) + "\n")
    assert text.tokens(tokenizer(chat=True), path).tolist() == [10, 18, 1, 8, 3, 16, 9, 17, 1]
    with pytest.raises(AerogelError, match="line 3 is a chat, and this tokenizer has no chat template"):
        text.tokens(tokenizer(), path)


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["the world", "our people"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "split")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "other")
    assert text.documents(tmp_path / "one") == text.documents(tmp_path / "split") == ["the world", "our people"]
    with pytest.raises(AerogelError, match=r"no split called train; give the folder of one split: .*/other/test"):
        text.documents(tmp_path / "other")


def test_without_the_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Dataset.from_dict({"text": ["the world"]}).save_to_disk(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(AerogelError, match=r"pip install 'aerogel\[datasets\]'"):
        text.documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("absent.txt", None, "no text source .* or one of: moby-dick, sotu, sotu-held-out"),
        ("empty.txt", b" \f\n", "is empty"),
        ("binary.txt", b"\x00\xff\xfe", "holds a zero byte, so it is no text"),
        ("broken.jsonl", b'{"text": ', "line 1 is not JSON"),
        ("other.jsonl", b'{"prompt": "a"}', "line 1 could be read by prompt; its columns are prompt: name one"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(AerogelError, match=complaint):
        text.documents(tmp_path / name)


def test_a_plain_folder_is_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="is not a folder saved by datasets"):
        text.documents(tmp_path)


def test_shipped_text_is_what_the_table_says() -> None:
    table = (Path(text.__file__).parent / "SOURCES.md").read_text()
    for name in text.SHIPPED:
        digest = hashlib.sha256((Path(text.__file__).parent / f"{name}.txt.gz").read_bytes()).hexdigest()
        documents = text.documents(name)
        assert f"`{digest}`" in table, name
        assert f"| {len(documents)} |" in table, name
    assert sum((Path(text.__file__).parent / f"{name}.txt.gz").stat().st_size for name in text.SHIPPED) < 2_000_000


def test_held_out_addresses_are_never_calibrated_on() -> None:
    calibration, held_out = text.documents("sotu"), text.documents("sotu-held-out")
    assert not {document[:200] for document in calibration} & {document[:200] for document in held_out}
    assert all(document[2000:2200] not in "\f".join(calibration) for document in held_out)


def test_fingerprint_is_of_shape_and_values() -> None:
    expected = hashlib.sha256(b"(2, 2)" + struct.pack("<4q", 1, 2, 3, 4)).hexdigest()
    assert text.fingerprint(torch.tensor([[1, 2], [3, 4]])) == f"sha256:{expected}"
    assert text.fingerprint(torch.tensor([1, 2, 3, 4])) != f"sha256:{expected}"


def test_calls_cover_every_sequence_once() -> None:
    rows = torch.arange(15).reshape(5, 3)
    made = text.calls(rows, batch=2)
    assert [tuple(call.kwargs["input_ids"].shape) for call in made] == [(2, 3), (2, 3), (1, 3)]
    assert torch.equal(torch.cat([call.kwargs["input_ids"] for call in made]), rows)
    assert all(call.args == () and set(call.kwargs) == {"input_ids", "use_cache"} and not call.kwargs["use_cache"] for call in made)
