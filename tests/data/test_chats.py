"""Chats about images become calls whose labels are the answers; what is no chat is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from aerogel.data import chats
from aerogel.data.chats import IGNORED, Chat
from aerogel.engine.calibration import CalibrationRequest, prepare, reading, shown
from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from aerogel.io.processors import Pair
from tests.questions import asked, untrained, written
from tests.tiny import opened


@pytest.fixture(scope="module")
def pair() -> Pair:
    return untrained()[1]


def test_labels_are_the_answer_and_its_end(pair: Pair) -> None:
    questions = asked(12)
    for call, some in zip(chats.calls(questions, pair, batch=4), (questions[:4], questions[4:8], questions[8:]), strict=True):
        for ids, labels, mask, chat in zip(*(call.kwargs[key] for key in ("input_ids", "labels", "attention_mask")), some, strict=True):
            assert pair.tokenizer.decode(labels[labels != IGNORED]) == f"{chat.answer}<|im_end|>"
            assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
            assert (labels != IGNORED).nonzero()[0] > mask.argmax()  # the prompt stands before it, padding before that
            assert mask.diff().min() >= 0


def test_images_become_their_tokens(pair: Pair) -> None:
    (call,) = chats.calls([chat for chat in asked(12) if chat.images], pair, batch=12)
    grids = call.kwargs["image_grid_thw"]
    assert int((call.kwargs["input_ids"] == pair.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum()) == int(grids.prod(1).sum()) // 4
    assert len(call.kwargs["pixel_values"]) == int(grids.prod(1).sum())
    assert torch.equal(call.kwargs["mm_token_type_ids"] == 1, call.kwargs["input_ids"] == 5)


def test_prompts_end_where_answers_begin(pair: Pair) -> None:
    questions = asked(6)
    (call,) = chats.calls(questions, pair, batch=6)
    (inputs,) = chats.prompts(questions, pair, batch=6)
    for row, chat in enumerate(questions):
        whole = call.kwargs["input_ids"][row][call.kwargs["labels"][row] == IGNORED]
        alive = call.kwargs["attention_mask"][row][call.kwargs["labels"][row] == IGNORED].bool()
        assert torch.equal(inputs["input_ids"][row][inputs["attention_mask"][row].bool()], whole[alive]), chat


def test_a_loss_over_labels_is_that_of_the_answers(pair: Pair) -> None:
    network, _ = untrained()
    (call,) = chats.calls(asked(5), pair, batch=5)
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
    ],
)
def test_what_is_no_chat_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(AerogelError, match=message):
        chats.read(path)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AerogelError, match="no chats at nowhere"):
        chats.read("nowhere")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AerogelError, match="holds no chat"):
        chats.read(tmp_path / "empty.jsonl")
    assert not chats.are_at(tmp_path / "empty.jsonl")
    with pytest.raises(AerogelError, match="need a processor with an image processor"):
        chats.calls(asked(1), opened("llama").processor)


def test_a_prompt_has_a_place_for_each_image(pair: Pair) -> None:
    image = Image.new("RGB", (28, 28))
    with pytest.raises(AerogelError, match=r"the prompt has 1 places for images .* and 2 are given"):
        pair("<|image_pad|>", [image, image])


def test_a_template_that_rewrites_prompts_is_refused(pair: Pair) -> None:
    class Rewriting(Pair):
        def apply_chat_template(self, messages: list[dict[str, object]], **options: object) -> str:
            return "asked" if options.get("add_generation_prompt") else "something else"

    chat = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    with pytest.raises(AerogelError, match="answers cannot be told from prompts"):
        chats.calls([chat], Rewriting(pair.tokenizer, pair.image_processor, pair.image_token))
