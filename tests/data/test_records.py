"""Columns of a record become a text, as written out here; what is none or ambiguous is one line with the columns that are there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.data.files import Record
from aerogel.data.records import text_of
from aerogel.errors import AerogelError, reasons
from tests.words import tokenizer

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported\n') }}{% endif %}" + TURNS


def read(value: Any, template: str | None = TURNS, column: str | None = None) -> str:
    known = tokenizer()
    known.chat_template = template
    return text_of(Record(value, "a.jsonl line 7"), known, column)


ASKED = {"role": "user", "content": "Where?"}
ANSWERED = {"role": "assistant", "content": "Here."}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "a"),
        ({"text": None}, ""),
        ({"text": None, "messages": [ASKED, ANSWERED]}, "<user>Where?<assistant>Here."),
        ({"messages": []}, ""),
        ({"messages": None}, ""),
        ({"messages": [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]}, "<system>Be brief.<user>Where?<assistant>Here."),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]}]}, "<user>Where?"),
        ({"messages": json.dumps([ASKED, ANSWERED])}, "<user>Where?<assistant>Here."),
        ({"messages": [ASKED], "system": "unread"}, "<user>Where?"),
        ({"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]}, "<user>Where?<assistant>Here."),
        ({"conversations": [{"from": "system", "value": "Hm."}, {"from": "human", "value": "?"}]}, "<system>Hm.<user>?"),
        ({"conversations": [{"from": "human", "value": "?", "weight": None}], "system": "Hm."}, "<system>Hm.<user>?"),
        ({"conversation": [{"role": "user", "content": "?"}]}, "<user>?"),
        ({"prompt": "The sky", "completion": " is blue."}, "The sky is blue."),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "<user>Where?<assistant>Here."),
        ({"prompt": "Where?", "response": "Here."}, "<user>Where?<assistant>Here."),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "<user>Add.\n\n1, 2<assistant>3"),
        ({"instruction": "Add.", "input": "", "output": "3"}, "<user>Add.<assistant>3"),
        ({"instruction": "Add.", "context": "1, 2", "response": "3", "category": "sums"}, "<user>Add.\n\n1, 2<assistant>3"),
        ({"input": "Add.", "output": "3"}, "<user>Add.<assistant>3"),
        ({"id": 4, "system_prompt": "Hm.", "question": "?", "response": "!"}, "<system>Hm.<user>?<assistant>!"),
        ({"question": "?", "answer": "!", "passage": "About."}, "<user>?<assistant>!"),
        ({"question": "?", "answer": None}, ""),
        ({"instruction": "", "output": "3"}, ""),
        ({"content": "a", "title": "b"}, "a"),
        ({"document": "a", "summary": "b"}, "a"),
    ],
)
def test_columns_are_found_by_their_names(value: Any, expected: str) -> None:
    assert read(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "Add.\n\n1, 2\n\n3"),
        ({"system": "Hm.", "question": "?", "answer": "!"}, "Hm.\n\n?\n\n!"),
        ({"prompt": "The sky", "completion": " is blue."}, "The sky is blue."),
    ],
)
def test_without_a_chat_template_an_answer_stands_behind_its_question(value: Any, expected: str) -> None:
    assert read(value, template=None) == expected


def test_a_column_is_named() -> None:
    value = {"text": "a", "summary": "b", "chosen": [ASKED], "n": 3, "none": None}
    assert read(value, column="summary") == "b"
    assert read(value, column="chosen") == "<user>Where?"
    assert read(value, column="none") == ""
    with pytest.raises(AerogelError, match=r"line 7 has no column 'body'; its columns are text, summary, chosen, n, none"):
        read(value, column="body")
    with pytest.raises(AerogelError, match=r"column 'n' holds int, expected a string or a chat"):
        read(value, column="n")
    with pytest.raises(AerogelError, match="line 7 is plain text without columns; leave out the column 'text'"):
        read("plain", column="text")


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Kyiv"}'}}


@pytest.mark.parametrize("arguments", ['{"city": "Kyiv"}', {"city": "Kyiv"}, {"city": "Kyiv", "unit": None}])
@pytest.mark.parametrize("tools", [[{"function": {"name": "weather"}}], '[{"function": {"name": "weather"}}]'])
def test_tools_and_their_calls(arguments: Any, tools: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    result = {"role": "tool", "content": "sun", "tool_calls": None}
    assert read({"messages": [ASKED, call, result], "tools": tools}, TOOLS) == "[weather]<user>Where?<assistant>weather:Kyiv<tool>sun"
    assert read({"messages": [ASKED], "tools": None}, TOOLS) == read({"messages": [ASKED], "tools": []}, TOOLS) == "<user>Where?"


def test_calls_without_content_need_a_template_that_writes_them() -> None:
    chat = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    assert read(chat, TOOLS) == "<user>Where?<assistant>weather:Kyiv"
    with pytest.raises(AerogelError, match="line 7 calls tools, and the model's chat template writes no tool calls; leave such chats out"):
        read(chat)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({}, "has no text that is found by its name; its columns are none"),
        ({"a": 1, "b": "x"}, r"has no text .*; its columns are a, b: name one \(--column"),
        ({"instruction": "a"}, "could be read by instruction; its columns are instruction"),
        ({"content": "a", "article": "b"}, "could be read by content, article"),
        ({"prompt": "a", "question": "b", "answer": "c"}, "could be read by question, prompt, answer"),
        ({"prompt": "a", "output": "b", "response": "c"}, "could be read by prompt, output, response"),
        ({"question": "a", "answer": {"text": ["c"]}}, "column 'answer' holds dict, expected a string"),
        ({"text": 5}, "column 'text' holds int"),
        ({"text": ["a"]}, "column 'text' holds list"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        (5, "holds int, expected an object with columns, or a string"),
        (None, "holds NoneType"),
        ([ASKED], "holds list"),
        ({"messages": "[{'role': 'user'}]"}, "column 'messages' is no JSON"),
        ({"messages": ["hello"]}, "column 'messages' holds list"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no role; its fields are content"),
        ({"messages": [ASKED, {"role": "assistant"}]}, r"turn 2 \(assistant\) has no content and no tool calls"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1 has content that is a int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "turn 1 has a part of the type image_url"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [5]}]}, "turn 1 has tool calls with a int"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"arguments": "{"}]}]}, "turn 1 calls a tool with arguments that are no JSON"),
        ({"messages": [ASKED], "tools": "["}, "tools is no JSON"),
        ({"messages": [ASKED], "tools": [5]}, "tools is a list, expected a list of JSON objects"),
        ({"conversations": [{"from": "judge", "value": "a"}]}, "turn 1 is from 'judge'; known speakers are human"),
        ({"conversations": [{"from": "human"}]}, r"turn 1 \(user\) has no content"),
    ],
)
def test_what_is_no_text_is_one_line(value: Any, complaint: str) -> None:
    with pytest.raises(AerogelError, match=rf"^a\.jsonl line 7.*{complaint}") as caught:
        read(value)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_is_one_line() -> None:
    chat = {"messages": [{"role": "system", "content": "Hm."}, ASKED]}
    expected = r"line 7: the model's chat template refuses this chat of system, user \(System role not supported\); change the record"
    with pytest.raises(AerogelError, match=expected) as caught:
        read(chat, NO_SYSTEM)
    assert "\n" not in str(caught.value)
    assert read({"messages": [ASKED]}, NO_SYSTEM) == "<user>Where?"
    with pytest.raises(AerogelError, match="chat template refuses"):
        read({"messages": [ASKED]}, "{{ messages[0].content + 5 }}")
    with pytest.raises(AerogelError, match="chat template refuses"):
        read({"messages": [ASKED]}, "{{ messages[0].absent.deeper }}")
    with pytest.raises(AerogelError, match="line 7 is a chat, and this tokenizer has no chat template; give records with a text field"):
        read({"messages": [ASKED]}, None)


NAMES = (
    "text",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "content",
    "tools",
    "role",
    "from",
    "value",
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.sampled_from(["user", "gpt", "[{}]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@given(json_values, st.sampled_from([None, "text", "messages"]), st.sampled_from([TURNS, TOOLS, None]))
@settings(max_examples=400, deadline=None)
def test_any_record_is_a_text_or_one_line(value: Any, column: str | None, template: str | None) -> None:
    found = list(reasons(lambda: text_of(Record(value, "a.jsonl line 7"), KNOWN[template], column)))
    assert all("\n" not in reason and reason.startswith("a.jsonl line 7") for reason in found)
    assert found or isinstance(value, str | dict)


KNOWN = {template: tokenizer() for template in (TURNS, TOOLS, None)}
for _template, _known in KNOWN.items():
    _known.chat_template = _template


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=9).filter(lambda text: text.isprintable())), min_size=1
    )
)
@settings(max_examples=60, deadline=None)
def test_shared_chats_are_those_of_openai(turns: list[tuple[str, str]]) -> None:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": speakers[role], "value": content} for role, content in turns]
    plain = [{"role": role, "content": content} for role, content in turns]
    parts = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns]
    expected = "".join(f"<{role}>{content}" for role, content in turns)
    for value in ({"conversations": shared}, {"messages": plain}, {"messages": parts}, {"conversations": json.dumps(shared)}):
        assert text_of(Record(value, "x"), KNOWN[TURNS]) == expected
