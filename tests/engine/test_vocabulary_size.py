"""A tokenizer with more tokens than the model has embeddings: refused before work, by the number that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import aerogel
from aerogel.engine.calibration import Samples
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from tests.tiny import FAMILIES, VOCABULARY
from tests.words import tokenizer

RECIPE = {"steps": [{"gptq": {"scheme": "W4A16_G16"}}]}


def model(folder: Path, own: PreTrainedTokenizerFast) -> Path:
    FAMILIES["llama"].build().save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


@pytest.fixture
def book(tmp_path: Path) -> str:
    (tmp_path / "book.txt").write_text("the people of the world and our peace " * 60)
    return str(tmp_path / "book.txt")


def test_a_tokenizer_of_another_model_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    inner: Any = Tokenizer(models.WordLevel({f"word{number}": number for number in range(VOCABULARY + 7)}, unk_token="word0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = model(tmp_path / "model", PreTrainedTokenizerFast(tokenizer_object=inner))
    made = plan(folder, RECIPE, samples=Samples("sotu", 2, 16))
    assert f"the tokenizer has {VOCABULARY + 7} tokens, and the model has embeddings for {VOCABULARY}" in made.problems[0]


def test_added_tokens_matter_where_the_text_has_them(tmp_path: Path, book: str) -> None:
    own = tokenizer()
    own.add_tokens([f"<unused{number}>" for number in range(VOCABULARY)])
    folder = model(tmp_path / "unused", own)
    aerogel.compress(folder, RECIPE, samples=Samples(book, 2, 16), measures=())
    own.add_tokens(["peace "])
    folder = model(tmp_path / "used", own)
    with pytest.raises(
        AerogelError, match=rf"the id {len(own) - 1} \('peace '\) of this text, and the model has embeddings for {VOCABULARY}"
    ):
        aerogel.compress(folder, RECIPE, samples=Samples(book, 2, 16), measures=())


def test_a_model_that_was_loaded_lazily_is_measured(tmp_path: Path, book: str) -> None:
    folder = model(tmp_path / "model", tokenizer())
    lazy, whole = (aerogel.measure(aerogel.load(folder, lazy=lazy), measures=["perplexity"], data=book) for lazy in (True, False))
    assert lazy == whole
