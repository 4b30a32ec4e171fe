"""Questions about collages: in the words that zoo/fashion-vlm was trained on, each of which is one token of its tokenizer."""

from __future__ import annotations

import re

from transformers import AutoTokenizer

from tests.questions import ZOO, asked


def test_every_word_of_a_question_is_one_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "fashion-vlm")
    texts = [part["text"] for chat in asked(64) for message in chat.messages for part in _parts(message["content"]) if "text" in part]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    assert len(words) > 20
    assert sorted(word for word in words if min(len(tokenizer.tokenize(f" {word}")), len(tokenizer.tokenize(word))) > 1) == []


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"text": content}] if isinstance(content, str) else content
