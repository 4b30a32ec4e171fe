"""Needle prompts: of exactly the length asked for, the number where it should be, the same for the same seed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aerogel.data import needles
from aerogel.errors import AerogelError

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}<assistant>"
NEEDLE = re.compile(r"One of the special magic numbers for (\S+) is: (\d{7})\.")


def bytewise(chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, so that lengths are those of the text."""
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)
    made.chat_template = CHAT if chat else None
    return made


def written(tokenizer: Any, prompt: needles.NeedlePrompt) -> str:
    """The text of a prompt."""
    said: str = tokenizer.decode(prompt.ids_L)
    return said


@pytest.mark.parametrize("length", [900, 1111, 4096])
@pytest.mark.parametrize("keys", [1, 3])
def test_prompts_have_their_length_and_the_number_its_depth(length: int, keys: int) -> None:
    tokenizer = bytewise()
    depths = (0.0, 0.5, 1.0)
    made = needles.prompts(tokenizer, length, depths, count=4, keys=keys)
    assert [one.depth for one in made] == [depth for depth in depths for _ in range(4)]
    for one in made:
        assert one.ids_L.shape == (length,)
        said = written(tokenizer, one)
        hidden = dict(NEEDLE.findall(said))
        (asked,) = re.findall(r"What is the special magic number for (\S+) mentioned", said)
        assert said.endswith(f"The special magic number for {asked} mentioned in the provided text is")
        assert len(hidden) == keys
        assert hidden[asked] == one.answer
        start = said.index("I will quiz you about them.\n") + len("I will quiz you about them.\n")
        text = NEEDLE.sub("", said[start : said.index("\nWhat is")])
        place = len(NEEDLE.sub("", said[start : said.index(f" One of the special magic numbers for {asked}")]))
        longest = max(map(len, re.split(r"(?<=[.!?]) ", text)))
        assert abs(place - one.depth * len(text)) <= longest + 2
    assert len({one.answer for one in made}) == 12


def test_the_seed_decides() -> None:
    tokenizer = bytewise()
    first, again, other = (needles.prompts(tokenizer, 1200, (0.5,), 2, seed=seed) for seed in (0, 0, 1))
    assert [one.ids_L.tolist() for one in first] == [one.ids_L.tolist() for one in again]
    assert [one.ids_L.tolist() for one in first] != [one.ids_L.tolist() for one in other]


def test_a_chat_begins_the_reply() -> None:
    tokenizer = bytewise(chat=True)
    (made,) = needles.prompts(tokenizer, 1200, (0.5,), chat=True)
    said = written(tokenizer, made)
    assert said.startswith("<user>Some special magic numbers")
    assert re.search(r"provided text\?<end><assistant>The special magic number for \S+ mentioned in the provided text is$", said)
    assert made.ids_L.shape == (1200,)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text. It ends here.")
    with pytest.raises(AerogelError, match=r"has 28 tokens, and a prompt needs \d+; give more text or ask for shorter prompts"):
        needles.prompts(bytewise(), 1000, (0.5,), source=str(short))
    with pytest.raises(AerogelError, match=r"nothing of the prompt is left for text; ask for \d+ more tokens at least"):
        needles.prompts(bytewise(), 100, (0.5,))
    with pytest.raises(AerogelError, match=r"^200 numbers are to be hidden, and there are names for 196; ask for fewer$"):
        needles.prompts(bytewise(), 100_000, (0.5,), keys=200)
    with pytest.raises(AerogelError, match="no chat template"):
        needles.prompts(bytewise(), 1000, (0.5,), chat=True)
