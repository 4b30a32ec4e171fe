"""Chats about images become calls whose labels are the answers; what is no chat is named with its line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from jinja2 import TemplateError
from PIL import Image

from aerogel.data import chats
from aerogel.data.chats import IGNORED, Chat
from aerogel.engine.calibration import CalibrationRequest, prepare, reading, shown
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io.processors import Pair
from tests.faults.judged import run_words
from tests.faults.kinds import make_image_text
from tests.questions import asked, untrained, written
from tests.tiny import opened


@pytest.fixture(scope="module")
def pair() -> Pair:
    return untrained()[1]


def test_labels_are_the_answer_and_its_end(pair: Pair) -> None:
    questions, said = asked(12), []
    for call in chats.calls(questions, pair, batch=4):
        assert call.kwargs["attention_mask"].all(), "rows of one length are not padded"
        assert len(call.kwargs["input_ids"]) <= 4
        for ids, labels in zip(call.kwargs["input_ids"], call.kwargs["labels"], strict=True):
            said.append(pair.tokenizer.decode(labels[labels != IGNORED]))
            assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
            assert labels[0] == IGNORED, "the prompt stands before it"
            assert labels[-1] != IGNORED
    assert sorted(said) == sorted(f"{chat.answer}<|im_end|>" for chat in questions)


def test_images_become_their_tokens(pair: Pair) -> None:
    calls = chats.calls([chat for chat in asked(12) if chat.images], pair, batch=12)
    assert any(len(call.kwargs["image_grid_thw"]) > 1 for call in calls)
    for call in calls:
        grids = call.kwargs["image_grid_thw"]
        places = call.kwargs["input_ids"] == pair.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert int(places.sum()) == int(grids.prod(1).sum()) // 4
        assert len(call.kwargs["pixel_values"]) == int(grids.prod(1).sum())
        assert torch.equal(call.kwargs["mm_token_type_ids"] == 1, call.kwargs["input_ids"] == 5)


def test_prompts_end_where_answers_begin(pair: Pair) -> None:
    questions = asked(6)
    (inputs,) = chats.prompts(questions, pair, batch=6)
    assert not inputs["attention_mask"].all(), "they differ in length"
    for row, chat in enumerate(questions):
        (call,) = chats.calls([chat], pair)
        whole = call.kwargs["input_ids"][call.kwargs["labels"] == IGNORED]
        assert torch.equal(inputs["input_ids"][row][inputs["attention_mask"][row].bool()], whole), chat


def test_a_loss_over_labels_is_that_of_the_answers(pair: Pair) -> None:
    network, _ = untrained()
    for call in chats.calls(asked(5), pair, batch=5):
        with torch.no_grad():
            out = network(**call.kwargs)
        at = call.kwargs["labels"][:, 1:] != IGNORED
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1][at], call.kwargs["labels"][:, 1:][at])
        torch.testing.assert_close(out.loss, expected)


def test_a_file_is_what_was_written(tmp_path: Path) -> None:
    path = written(tmp_path, 6)
    assert chats.are_at(path)
    for ours, theirs in zip(chats.read(path), asked(6), strict=True):
        assert ours.messages == theirs.messages
        assert [image.tobytes() for image in ours.images] == [image.tobytes() for image in theirs.images]


def test_a_network_is_shown_chats_by_their_path(tmp_path: Path) -> None:
    module, pair = untrained()
    network = open_model((module, pair))
    wanted = shown(network, CalibrationRequest(source=str(written(tmp_path, 9)), count=5))
    made = prepare(network, wanted, 0, head=False)
    assert sum(len(call.kwargs["input_ids"]) for call in made.calls) == made.facts["count"] == 5
    assert made.facts["fingerprint"] == prepare(network, wanted, 0, head=False).facts["fingerprint"]
    assert made.facts["fingerprint"] != prepare(network, wanted, 1, head=False).facts["fingerprint"]
    assert reading(network, wanted).tokens > 0
    with pytest.raises(AerogelError, match="length does not apply to chats"):
        shown(network, CalibrationRequest(source=str(tmp_path / "samples.jsonl"), length=64))


def _same(found: list[Chat], expected: list[Chat]) -> bool:
    """Whether chats are of the same turns and images."""
    return chats.fingerprint(found) == chats.fingerprint(expected)


def test_every_format_of_records(tmp_path: Path) -> None:
    path = written(tmp_path, 6)
    records, expected = [json.loads(line) for line in path.read_text().splitlines()], chats.read(path)
    (tmp_path / "array.json").write_text(json.dumps(records))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = [
        {**record, "images": [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in record["images"]]} for record in records
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(packed), tmp_path / "packed.parquet")
    for name in ("array.json", "packed.jsonl.gz", "packed.parquet"):
        assert chats.are_at(tmp_path / name), name
        assert _same(chats.read(tmp_path / name), expected), name
    rows = [{**record, "images": list(chat.images)} for record, chat in zip(records, expected, strict=True)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert chats.are_at(tmp_path / "saved")
    assert _same(chats.read(tmp_path / "saved"), expected)


def test_shared_chats_show_an_image_where_their_mark_is(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "1", "image": "red.png", "conversations": turns}]))
    assert chats.are_at(tmp_path / "a.json")
    (found,) = chats.read(tmp_path / "a.json")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}
    assert found.messages == [asked, {"role": "assistant", "content": "Red."}]
    assert [image.getpixel((0, 0)) for image in found.images] == [(255, 0, 0)]


def test_text_is_no_chat(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the war")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    (tmp_path / "b.jsonl").write_text("damaged")
    os.mkfifo(tmp_path / "c.jsonl")
    assert not any(
        chats.are_at(source) for source in ("sotu", "none.jsonl", *(tmp_path / name for name in ("a.txt", "a.jsonl", "b.jsonl", "c.jsonl")))
    )


def test_a_template_that_refuses_names_the_chat(pair: Pair) -> None:
    class Refusing(Pair):
        def apply_chat_template(self, messages: list[dict[str, object]], **options: object) -> str:
            raise TemplateError("no system turn\n")

    chat = Chat([{"role": "system", "content": "?"}, {"role": "assistant", "content": "!"}], place="a.jsonl line 3")
    with pytest.raises(
        AerogelError, match=r"^a\.jsonl line 3: the model's chat template refuses this chat of system, assistant \(no system turn\)"
    ):
        chats.calls([chat], Refusing(pair.tokenizer, pair.image_processor, pair.image_token))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        (json.dumps({"messages": []}), "line 2 is no chat with an answer"),
        (json.dumps({"messages": [{"role": "user", "content": "?"}]}), "line 2 is no chat with an answer"),
        (
            json.dumps({"messages": [{"role": "assistant", "content": "!"}], "images": ["no.png"]}),
            r"line 2 shows no\.png, which is not beside",
        ),
        (
            json.dumps({"messages": [{"role": "assistant", "content": "!"}], "images": ["samples.jsonl"]}),
            r"line 2 shows samples\.jsonl, which cannot be opened",
        ),
        (json.dumps({"messages": [{"role": "assistant", "content": "!"}], "images": [5]}), "line 2 has an image that is int"),
        (json.dumps({"messages": [{"role": "assistant", "content": "!"}], "images": ["."]}), r"line 2 shows \., which is not beside"),
        (json.dumps({"messages": [{"role": "assistant", "content": []}]}), "line 2: its answer, the last turn, has no text"),
        (json.dumps({"messages": [{"role": "assistant", "content": "\ud800"}]}), "line 2 has half of a surrogate pair"),
        (json.dumps({"messages": [5]}), "line 2: turn 1 is a int, expected an object with role and content"),
        (
            json.dumps({"messages": [{"role": "assistant", "content": [{"type": "text", "text": [1, 2]}]}]}),
            "whose text is a list, expected",
        ),
        (
            json.dumps({"messages": [{"role": "assistant", "content": [{"type": 3, "text": "!"}]}]}),
            "whose type is a int, expected a string",
        ),
        (json.dumps({"messages": [{"role": "assistant", "content": [{}]}]}), "part of content that is an object without a type"),
        (json.dumps({"messages": [{"role": "assistant", "content": [5]}]}), "turn 1 has a part of content that is a int without a type"),
        ("[]", "line 2 is no chat with an answer"),
    ],
)
def test_what_is_no_chat_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(AerogelError, match=message):
        chats.read(path)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match=r"no chats at nowhere\.jsonl"):
        chats.read("nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AerogelError, match="holds no chat"):
        chats.read(tmp_path / "empty.jsonl")
    assert not chats.are_at(tmp_path / "empty.jsonl")
    with pytest.raises(AerogelError, match="need a processor with an image processor"):
        chats.calls(asked(1), opened("llama").processor)


def test_a_model_without_a_chat_template_is_named(tmp_path: Path) -> None:
    make_image_text(tmp_path)
    (tmp_path / "in/chat_template.jinja").unlink()
    processor = open_model(str(tmp_path / "in")).processor
    with pytest.raises(AerogelError, match=f"need a processor with .*; {tmp_path / 'in'} has no chat template$"):
        chats.calls(chats.read(tmp_path / "chats.json"), processor)


def test_a_prompt_has_a_place_for_each_image(pair: Pair) -> None:
    image = Image.new("RGB", (28, 28))
    with pytest.raises(AerogelError, match=r"the prompt has 1 places for images .* and 2 are given"):
        pair("<|image_pad|>", [image, image])


def test_what_a_processor_cannot_read_is_named(pair: Pair) -> None:
    """A processor's code fails in its own ways on images without a place, and on settings that are none."""

    class Failing:
        chat_template, image_processor = "x", None

        def __init__(self, error: Exception) -> None:
            self.error = error

        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "the"

        def __call__(self, **_: Any) -> Any:
            raise self.error

    (chat,) = asked(1)
    for error in (IndexError("list index out of range"), StopIteration(), MemoryError(), TypeError("'<' not supported")):
        with pytest.raises(AerogelError, match=r"the model's processor cannot read this chat with \d images \("):
            chats.calls([chat], Failing(error))
        with pytest.raises(AerogelError, match="the model's processor cannot read this chat"):
            next(chats.prompts([chat], Failing(error)))


def test_images_of_another_processor_are_refused_in_one_line(tmp_path: Path) -> None:
    """A processor that makes fewer tokens of an image than its model has features of it."""
    make_image_text(tmp_path)
    path = tmp_path / "in/processor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "num_additional_image_tokens": 0}))
    data = ("--data", tmp_path / "chats.json")
    for words in (
        ("compress", tmp_path / "in", "-r", "gptq-w4a16", "--scheme", "W4A16_G32", "-o", tmp_path / "out", *data, "--no-evaluate"),
        ("evaluate", tmp_path / "in", "--measure", "exact_match", *data),
    ):
        ended = run_words([*map(str, words), "-q"])
        assert (ended.code, ended.fault) == (2, None), words
        assert f"error: {tmp_path / 'in'} refuses the images in its inputs (" in ended.told


def test_a_template_that_rewrites_prompts_is_refused(pair: Pair) -> None:
    class Rewriting(Pair):
        def apply_chat_template(self, messages: list[dict[str, object]], **options: object) -> str:
            return "asked" if options.get("add_generation_prompt") else "something else"

    chat = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    with pytest.raises(AerogelError, match="answers cannot be told from prompts"):
        chats.calls([chat], Rewriting(pair.tokenizer, pair.image_processor, pair.image_token))
