"""Chats as chat templates take them: turns by role, from OpenAI's `messages` and ShareGPT's `conversations`, and their tools."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aerogel.errors import AerogelError

Message = dict[str, Any]

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles of the speakers that ShareGPT's format has."""


def messages_of(turns: Any, place: str) -> list[Message]:
    """Return the turns of a chat with `role` and `content`; raises AerogelError, with the place, for what is no turn.

    Fields that are null are left out, but for the content of a turn with tool calls; a turn is otherwise as it was given.
    """
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise AerogelError(f"{place}: a chat is a list of turns with role and content, got {_kind(turns)}")
    return [_message(turn, f"{place}: turn {number}") for number, turn in enumerate(turns, start=1)]


def tools_of(given: Any, place: str) -> list[Any] | None:
    """Return the tools of a chat, from a list or its JSON; None where there are none."""
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise AerogelError(f"{place}: tools is no JSON ({error}); a list of tools, or its JSON, is expected") from error
    if not given:
        return None
    if not isinstance(given, Sequence) or not all(isinstance(tool, Mapping) for tool in given):
        raise AerogelError(f"{place}: tools is {_kind(given)}, expected a list of JSON objects")
    return [_without_null(tool) for tool in given]


def rendered(messages: Sequence[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase | None, place: str) -> str:
    """Return a chat as text, by the tokenizer's chat template.

    Raises AerogelError without a template, for content that is no text, and for what the template refuses, such as a system turn.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise AerogelError(f"{place} is a chat, and this tokenizer has no chat template; give records with a text field")
    turns = [_as_text(message, f"{place}: turn {number}") for number, message in enumerate(messages, start=1)]
    if any("content" not in turn for turn in turns) and "tool_calls" not in str(tokenizer.chat_template):
        raise AerogelError(f"{place} calls tools, and the model's chat template writes no tool calls; leave such chats out, or give text")
    given = {} if tools is None else {"tools": tools}
    with explained(turns, place):
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **given))


@contextmanager
def explained(turns: Sequence[Message], place: str) -> Iterator[None]:
    """Turn what a chat template raises into AerogelError: by its own word, or as its code fails on a turn that it does not expect."""
    try:
        yield
    except AerogelError:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        roles = ", ".join(str(turn.get("role")) for turn in turns[:6])
        raise AerogelError(
            f"{place}: the model's chat template refuses this chat of {roles} ({reason}); change the record, or give text"
        ) from error


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise AerogelError(f"{place} is {_kind(turn)}, expected an object with role and content")
    found = {name: value for name, value in turn.items() if value is not None}
    if "role" not in found and "from" in found:
        found = _shared(found, place)
    if not isinstance(found.get("role"), str):
        raise AerogelError(f"{place} has no role; its fields are {', '.join(map(str, turn))}")
    calls = found.get("tool_calls")
    if calls:
        found["tool_calls"] = [_tool_call(call, place) for call in calls] if isinstance(calls, list) else _refuse_calls(calls, place)
    if "content" not in found:
        if not calls:
            raise AerogelError(f"{place} ({found['role']}) has no content and no tool calls")
        found["content"] = None
    if not isinstance(found["content"], str | list | None):
        raise AerogelError(f"{place} has content that is {_kind(found['content'])}, expected a string or a list of parts")
    for part in found["content"] if isinstance(found["content"], list) else ():
        _require_part(part, place)
    return {**found, "content": _without_null(found["content"])}


def _require_part(part: Any, place: str) -> None:
    """Raise AerogelError for a part of content that a template would write as Python shows it, or as nothing."""
    if isinstance(part, str):
        return
    if not isinstance(part, Mapping) or not any(isinstance(part.get(name), str) for name in ("type", "text")):
        raise AerogelError(f"{place} has a part of content that is {_kind(part)} without a type, expected text or an object with a type")
    for name in ("type", "text"):
        if not isinstance(part.get(name), str | None):
            raise AerogelError(f"{place} has a part of content whose {name} is {_kind(part[name])}, expected a string")


def _shared(turn: Mapping[str, Any], place: str) -> Message:
    """A turn in ShareGPT's format as one with a role."""
    speaker = str(turn["from"])
    if speaker.lower() not in _SPEAKERS:
        raise AerogelError(f"{place} is from {speaker!r}; known speakers are {', '.join(_SPEAKERS)}")
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": _SPEAKERS[speaker.lower()], **({"content": turn["value"]} if "value" in turn else {}), **others}


def _tool_call(call: Any, place: str) -> Any:
    """A tool call whose arguments are an object, as templates expect them; the API of OpenAI gives them as JSON."""
    if not isinstance(call, Mapping):
        return _refuse_calls(call, place)
    found = _without_null(call)
    holder = found["function"] if isinstance(found.get("function"), dict) else found
    if isinstance(given := holder.get("arguments"), str):
        try:
            holder["arguments"] = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise AerogelError(f"{place} calls a tool with arguments that are no JSON ({error})") from error
    return found


def _refuse_calls(given: Any, place: str) -> Any:
    raise AerogelError(f"{place} has tool calls with {_kind(given)}, expected a list of objects")


def _as_text(message: Message, place: str) -> Message:
    """A turn whose content is one string: parts of text are joined. Null is left out, as templates would write it as None."""
    content = message["content"]
    if not isinstance(content, list):
        return message if content is not None else {name: value for name, value in message.items() if name != "content"}
    return {**message, "content": "".join(_part(part, place) for part in content)}


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") not in ("text", "input_text", "output_text"):
        what = part.get("type", "unknown") if isinstance(part, Mapping) else _kind(part)
        raise AerogelError(f"{place} has a part of the type {what}; only text can be read here")
    return text


def _without_null(value: Any) -> Any:
    """An object without its null fields, at every depth: tables fill in what a row does not have."""
    if isinstance(value, Mapping):
        return {name: _without_null(inner) for name, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return {type(None): "null", str: "a string", dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")
