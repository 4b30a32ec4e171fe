"""A record as the text of a document: which of its columns are read, and how a chat or a question with its answer is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from aerogel.data.files import Record, require_unicode
from aerogel.data.messages import Message, messages_of, rendered, tools_of
from aerogel.errors import AerogelError

CHATS = ("messages", "conversations", "conversation")
"""Columns with a chat."""
TEXTS = ("content", "document", "article", "passage", "sentence")
"""Columns with a text, besides `text`."""
ASKED = ("instruction", "question", "query", "prompt")
"""Columns with what is asked; `input` beside one of them belongs to it, and alone it is one."""
ANSWERED = ("output", "response", "answer", "completion")
"""Columns with the answer."""
_CONTEXT = ("input", "context")
_SYSTEM = ("system", "system_prompt")


def text_of(record: Record, tokenizer: PreTrainedTokenizerBase | None = None, column: str | None = None) -> str:
    """Return the text of a record, empty where its columns are: by `column`, else by the first of these that it has.

    `text`; a chat in `messages` or `conversations`, through the tokenizer's chat template; `prompt` and `completion`, one behind the
    other; an instruction or question with its answer, as a chat where there is a template and else with an empty line between; one
    column of TEXTS. Raises AerogelError, with the place and the columns that are there, where none fits or several do.
    """
    return require_unicode(_found(record, tokenizer, column), record.place)


def _found(record: Record, tokenizer: PreTrainedTokenizerBase | None, column: str | None) -> str:
    value, place = record
    if isinstance(value, str):
        if column is not None:
            raise AerogelError(f"{place} is plain text without columns; leave out the column {column!r}")
        return value
    if not isinstance(value, Mapping):
        raise AerogelError(f"{place} holds {type(value).__name__}, expected an object with columns, or a string")
    if column is not None and column not in value:
        raise AerogelError(f"{place} has no column {column!r}; its columns are {_columns(value)}")
    match columns_of(value, column):
        case (name,):
            return _of_column(value, name, tokenizer, place)
        case (asked, answered):
            return _answered(value, asked, answered, tokenizer, place)
    candidates = [name for name in (*TEXTS, *ASKED, *ANSWERED) if name in value]
    wrong = f"could be read by {', '.join(candidates)}" if candidates else "has no text that is found by its name"
    raise AerogelError(f"{place} {wrong}; its columns are {_columns(value)}: name one (--column, or column= in Python)")


def columns_of(value: Any, column: str | None = None) -> tuple[str, ...]:
    """Return the column with a record's text or chat, or the two with a question and its answer; none where none or several fit."""
    if not isinstance(value, Mapping) or column is not None:
        return () if column is None else (column,)
    there = [name for name in ("text", *CHATS) if name in value]
    if there:
        return (next((name for name in there if value[name] is not None), there[0]),)
    asked, answered = ([name for name in names if name in value] for names in (ASKED, ANSWERED))
    if not asked and answered and "input" in value:
        asked = ["input"]
    if asked and answered:  # a text beside them is such as a passage that the question is about
        return (asked[0], answered[0]) if (len(asked), len(answered)) == (1, 1) else ()
    texts = [name for name in TEXTS if isinstance(value.get(name), str)]
    return (texts[0],) if len(texts) == 1 else ()


def _of_column(value: Mapping[str, Any], column: str, tokenizer: PreTrainedTokenizerBase | None, place: str) -> str:
    """A text or a chat in a column; nothing where it is null or empty."""
    cell = value[column]
    if isinstance(cell, str) and column in CHATS and cell.lstrip().startswith("["):  # a cell of a .csv
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise AerogelError(f"{place}: column {column!r} is no JSON ({error}); write the chat as JSON, or the file as .jsonl") from error
    if cell is None or isinstance(cell, str):
        return cell or ""
    if isinstance(cell, list) and all(isinstance(turn, Mapping) for turn in cell):
        turns = messages_of(cell, place)
        system = "" if column == "messages" else _first(value, _SYSTEM)
        if turns and system and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        return rendered(turns, tools_of(value.get("tools"), place), tokenizer, place) if turns else ""
    raise AerogelError(
        f"{place}: column {column!r} holds {type(cell).__name__}, expected a string or a chat; its columns are {_columns(value)}"
    )


def _answered(value: Mapping[str, Any], asked: str, answered: str, tokenizer: PreTrainedTokenizerBase | None, place: str) -> str:
    question, answer = value[asked], value[answered]
    if all(isinstance(part, list) for part in (question, answer)):
        return rendered(messages_of([*question, *answer], place), tools_of(value.get("tools"), place), tokenizer, place)
    for name in (asked, answered):
        if not isinstance(value[name], str | None):
            raise AerogelError(f"{place}: column {name!r} holds {type(value[name]).__name__}, expected a string")
    if not question or not answer:
        return ""
    if (asked, answered) == ("prompt", "completion"):
        return str(question) + str(answer)
    system = _first(value, _SYSTEM)
    context = _first(value, tuple(name for name in _CONTEXT if name != asked))
    question = "\n\n".join(part for part in (question, context) if part)
    if tokenizer is None or not tokenizer.chat_template:
        return "\n\n".join(part for part in (system, question, answer) if part)
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    return rendered([*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], None, tokenizer, place)


def _first(value: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((cell for name in names if isinstance(cell := value.get(name), str) and cell), "")


def _columns(value: Mapping[str, Any]) -> str:
    return ", ".join(map(str, value)) or "none"
