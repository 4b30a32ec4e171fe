"""Prompts of a given length with a number hidden in book text and a question for it at the end: retrieval from long contexts.

The sentences and the question are those of RULER's needle tasks (arXiv:2404.06654), single-key and multi-key. B prompts of L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aerogel.data import sources, text
from aerogel.data.chats import IGNORED
from aerogel.data.tokenized import TOKENS_OF_A_CALL
from aerogel.errors import AerogelError
from aerogel.model.calls import Call

NAME = "needles"
"""Name that such prompts have as data; behind a colon stands how many numbers are hidden in each."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Depths that prompts take in turns."""
_MARGIN = 4
"""Tokens beyond those of the answer that a model may write."""
_INTRODUCTION = "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you about them.\n"
_NEEDLE = " One of the special magic numbers for {key} is: {number}."
_QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?"
_ANSWER = " The special magic number for {key} mentioned in the provided text is"
_ADJECTIVES = (
    "ancient",
    "brave",
    "calm",
    "distant",
    "early",
    "frozen",
    "gentle",
    "hidden",
    "iron",
    "jolly",
    "keen",
    "lonely",
    "modern",
    "noble",
)
_NOUNS = (
    "anchor",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "lantern",
    "mirror",
    "needle",
)
MOST_KEYS = len(_ADJECTIVES) * len(_NOUNS)
_SENTENCE = re.compile(r"\S.*?(?:[.!?]['\"]?(?=\s)|$)", re.DOTALL)
_CONTENT = "CONTENT-OF-THE-TURN"
"""Text that a chat template is asked to put into a turn, to find what it puts around it."""


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt whose next tokens are the answer."""

    ids_L: Tensor
    """Token ids."""
    answer: str
    """The number that is asked for."""
    depth: float
    """Place of its sentence, as a share of the book text."""


@dataclass(frozen=True)
class Needles:
    """Prompts with hidden numbers that a language model is calibrated on and judged by; an answer follows each."""

    keys: int = 1
    """Numbers that are hidden in a prompt, one of which is asked for."""
    count: int = 10
    """Prompts; their depths take turns."""
    length: int = 2048
    """Tokens of a prompt, the question among them; those of the answer come behind."""
    batch_size: int | None = None
    """Prompts in one call; None: as many as have TOKENS_OF_A_CALL tokens."""
    source: str = "moby-dick"
    """Text that numbers are hidden in."""

    @property
    def batch(self) -> int:
        """Prompts in one call."""
        return min(self.count, self.batch_size or max(1, TOKENS_OF_A_CALL // self.length))

    @property
    def name(self) -> str:
        """Name in a run's record, which is what a user gives."""
        return f"{NAME}:{self.keys}"

    def drawn(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[NeedlePrompt]:
        """Return the prompts, in the tokenizer's chat template where it has one."""
        depths = [DEPTHS[number % len(DEPTHS)] for number in range(self.count)]
        return prompts(tokenizer, self.length, depths, 1, self.keys, seed, self.source, bool(tokenizer.chat_template))


def is_named(source: Any) -> bool:
    """Return True for the name of such prompts, with a number of keys or without."""
    return isinstance(source, str) and source.partition(":")[0] == NAME


def keys_of(name: str) -> int | None:
    """Return how many numbers are to be hidden, None where the name does not say; raises AerogelError for what is no such number."""
    _, colon, said = name.partition(":")
    if not colon:
        return None
    if not said.isdecimal() or not 1 <= int(said) <= MOST_KEYS:
        raise AerogelError(f"{name!r} does not say how many numbers are hidden: give {NAME}, or {NAME}:1 to {NAME}:{MOST_KEYS}")
    return int(said)


def calls(asked: Sequence[NeedlePrompt], tokenizer: PreTrainedTokenizerBase, batch: int) -> list[Call]:
    """Return the forwards that read prompts and their answers, which `labels` mark; those of one length share a call, without padding."""
    alike: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for one in asked:
        answer_L = torch.tensor(_answer(tokenizer, one))
        ids_L = torch.cat([one.ids_L, answer_L])
        labels_L = torch.cat([torch.full_like(one.ids_L, IGNORED), answer_L])
        alike.setdefault(len(ids_L), []).append((ids_L, labels_L))
    found = []
    for rows in alike.values():
        ids_NL, labels_NL = (torch.stack(parts) for parts in zip(*rows, strict=True))
        for ids_BL, labels_BL in zip(ids_NL.split(batch), labels_NL.split(batch), strict=True):
            found.append(Call((), {"input_ids": ids_BL, "labels": labels_BL, "use_cache": False}))
    return found


def reply_tokens(tokenizer: PreTrainedTokenizerBase, asked: Sequence[NeedlePrompt]) -> int:
    """Return how many tokens a model may write behind a prompt: those of an answer, and some more."""
    return _MARGIN + max(len(_answer(tokenizer, one)) for one in asked)


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depths: Sequence[float],
    count: int = 1,
    keys: int = 1,
    seed: int = 0,
    source: Any = "moby-dick",
    chat: bool = False,
) -> list[NeedlePrompt]:
    """Return `count` prompts of exactly `length` tokens for each depth; the same for the same seed.

    `keys` sentences with numbers are hidden, one of which is asked for; the others are anywhere. With `chat` the prompt is the user's turn
    in the tokenizer's chat template, and the reply has begun. Raises AerogelError when the text or the length does not suffice.
    """
    if keys > MOST_KEYS:
        raise AerogelError(f"{keys} numbers are to be hidden, and there are names for {MOST_KEYS}; ask for fewer")
    sentences, random = _sentences(source), Random(seed)
    before, after = _around(tokenizer, chat)
    made = []
    for depth in depths:
        for _ in range(count):
            names = random.sample([f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS], keys)
            numbers = random.sample(range(1_000_000, 10_000_000), keys)
            needles = [_ids(tokenizer, _NEEDLE.format(key=key, number=number)) for key, number in zip(names, numbers, strict=True)]
            question = (
                _ids(tokenizer, _QUESTION.format(key=names[0])) + after + _ids(tokenizer, _ANSWER.format(key=names[0]).lstrip(" " * chat))
            )
            room = length - len(before) - sum(map(len, needles)) - len(question)
            drawn = _drawn(tokenizer, sentences, room, random, source)
            body = _hidden(drawn, needles, [depth, *(random.random() for _ in names[1:])])
            made.append(NeedlePrompt(torch.tensor(before + body + question), str(numbers[0]), depth))
    return made


def _hidden(sentences: list[list[int]], needles: list[list[int]], depths: list[float]) -> list[int]:
    """Sentences with needles between them, each at the end of the sentence that is nearest to its depth."""
    between = [0, *accumulate(map(len, sentences))]
    places = [min(range(len(between)), key=lambda place: abs(between[place] - depth * between[-1])) for depth in depths]
    body: list[int] = []
    for place, sentence in enumerate([*sentences, []]):
        for needle, at in zip(needles, places, strict=True):
            body += needle if at == place else []
        body += sentence
    return body


def _drawn(tokenizer: PreTrainedTokenizerBase, sentences: list[str], room: int, random: Random, source: Any) -> list[list[int]]:
    """Sentences in a row from a random one on, `room` tokens in all; the first may begin in its middle, and the text runs in a circle."""
    if room < 1:
        raise AerogelError(f"nothing of the prompt is left for text; ask for {1 - room} more tokens at least")
    start, drawn, there = random.randrange(len(sentences)), list[list[int]](), 0
    for sentence in sentences[start:] + sentences[:start]:
        drawn.append(_ids(tokenizer, f" {sentence}"))
        there += len(drawn[-1])
        if there >= room:
            break
    if there < room:
        name = sources.name_of(source)
        raise AerogelError(f"text source {name!r} has {there} tokens, and a prompt needs {room}; give more text or ask for shorter prompts")
    for place, ids in enumerate(drawn):
        cut = min(len(ids), there - room)
        drawn[place], there = ids[cut:], there - cut
    return drawn


def _sentences(source: Any) -> list[str]:
    """The sentences of a text, those of all documents in a row."""
    found = (match.group() for document in text.read(source) for match in _SENTENCE.finditer(document))
    return [" ".join(sentence.split()) for sentence in found]


def _around(tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[list[int], list[int]]:
    """The tokens before the text of a prompt, the introduction among them, and those between the question and the reply."""
    if not chat:
        return text.opening(tokenizer) + _ids(tokenizer, _INTRODUCTION), []
    if not tokenizer.chat_template:
        raise AerogelError("this tokenizer has no chat template; ask for prompts without chat")
    turn = [{"role": "user", "content": _CONTENT}]
    before, _, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).partition(_CONTENT)
    return _ids(tokenizer, before + _INTRODUCTION), _ids(tokenizer, after)


def _answer(tokenizer: PreTrainedTokenizerBase, prompt: NeedlePrompt) -> list[int]:
    return _ids(tokenizer, f" {prompt.answer}")


def _ids(tokenizer: PreTrainedTokenizerBase, written: str) -> list[int]:
    ids: list[int] = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
