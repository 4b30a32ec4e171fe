"""Inputs that are single files, a recipe or data, and the words of every option of every command."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

import aerogel
from tests import image_pipelines
from tests.faults.commands import CHATTED, GPTQ, PERPLEXITY, SAVED, SHORT, Words, planned, scores, weights
from tests.faults.damages import Damage, of_file, values_of
from tests.faults.judged import COMMANDS, Command
from tests.faults.kinds import Kind, make_image_text
from tests.folders import model_folder, text_file
from tests.io import test_two_denoisers

_STEPS = [
    {"gptq": {"scheme": "W4A16_G32", "ignore": ["lm_head"], "percdamp": 0.01, "block_size": 32, "overrides": {"*.down_proj": "W8A16_G32"}}}
]


def _make_recipe(folder: Path) -> None:
    text_file(folder / "text.txt", 200)
    model_folder(folder / "sound", num_hidden_layers=1)
    data = {"samples": 2, "length": 8, "seed": 0, "batch_size": 2}
    # YAML takes JSON.
    (folder / "own.yaml").write_text(
        json.dumps({"name": "own", "model": {"dtype": "float32", "name": "sound"}, "data": data, "steps": _STEPS})
    )


_TEN = ", ".join(["x"] * 10)
_BOMB = "\n".join([f"a0: &a0 [{_TEN}]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8))])
_STEP = "steps: [{gptq: {scheme: W4A16_G32, %s}}]"
_YAML = (
    *("", "steps:", "steps: []", "- a", "5", "steps: {gptq: {}}", "steps: [gptq]", "steps: [{gptq: [1]}]", "steps: [{}]"),
    *("steps: [{gptq: {}, rtn: {}}]", "steps: [{1: {}}]", "steps: [{gptq: {1: 2}}]", "steps: [{gptq: {scheme: [W4A16]}}]"),
    *("steps: [{gptq: {<<: 3}}]", "steps: [{gptq: {scheme: W4A16_G32}}]\nsteps: []", "steps: [{rtn: {overrides: {}}}]\nname: 3"),
    *(_STEP % "targets: 're:(a|a)*$'", _STEP % "percdamp: .nan", _STEP % "percdamp: '1'", _STEP % "overrides: {'re:(': W8A16}"),
    *("a: &a [*a]", "x: !!python/object/apply:os.system [ls]", "[" * 10_000, "\tsteps: 3", "? {a: b}\n: c", "{1: 2}", "2024-13-45"),
    *("%YAML 9.9\n---\nsteps: []", f"{_BOMB}\n{_STEP % 'ignore: *a7'}"),
)
"""Texts that are no recipe, or no recipe that can be run on the model."""


def _of_recipe(folder: Path, count: int) -> Iterator[Damage]:
    path = folder / "own.yaml"
    yield from of_file(path, path.name, count)
    yield from (Damage(f"content {text[:60]!r}", path.name, partial(_write, text)) for text in _YAML)
    yield from values_of(json.loads(path.read_text()), path.name, 4 * count)


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _planned_recipe(given: Path, output: Path) -> Words:
    return "plan", given / "sound", "--recipe", given / "own.yaml", "--data", given / "text.txt", "--json"


def _compressed_recipe(given: Path, output: Path) -> Words:
    return "compress", given / "sound", "--recipe", given / "own.yaml", "--data", given / "text.txt", *SAVED, output


_TEXT = ["the people of the world and the congress of peace in a war that is for our people", "we the people"] * 8
_RECORDS: Mapping[str, list[Any]] = {
    "text": [{"text": text} for text in _TEXT],
    "chat": [{"messages": [{"role": "user", "content": "the people"}, {"role": "assistant", "content": text}]} for text in _TEXT],
    "answer": [{"instruction": "the people", "output": text} for text in _TEXT],
}


def _make_data(name: str, folder: Path) -> None:
    text_file(folder / "text.txt", 200)
    model_folder(folder / "sound", num_hidden_layers=1)
    rows = _RECORDS[name.partition(".")[0]]
    content = {
        "txt": lambda: "\n".join(_TEXT).encode(),
        "jsonl": lambda: "\n".join(map(json.dumps, rows)).encode(),
        "json": lambda: json.dumps(rows).encode(),
        "csv": lambda: "\n".join(["id,text", *(f"{number},{text}" for number, text in enumerate(_TEXT))]).encode(),
        "tsv": lambda: "\n".join(["id\ttext", *(f"{number}\t{text}" for number, text in enumerate(_TEXT))]).encode(),
        "parquet": lambda: _parquet(rows, folder / "rows.parquet"),
    }[name.removesuffix(".gz").rpartition(".")[2]]()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def _parquet(rows: list[Any], path: Path) -> bytes:
    Dataset.from_list(rows).to_parquet(path)
    data = path.read_bytes()
    path.unlink()
    return data


_BYTES = {
    "Latin-1": b"the war \xe9t\xe9\n",
    "UTF-16 that is cut": "the".encode("utf-16")[:-1],
    "zeros inside": b"the\x00war",
    "half of a surrogate": b'{"text": "\\ud800"}',
    "an array in an array": b'[["the"]]',
    "a number": b"3",
    "a huge number": b'{"text": ' + b"9" * 5000 + b"}",
    "NaN": b'{"text": NaN}',
    "no column": b'{"a": 1}',
    "two columns": b'{"content": "a", "document": "b"}',
    "a role that is none": b'{"messages": [{"role": 3, "content": "a"}]}',
    "messages that are text": b'{"messages": "a"}',
    "no messages": b'{"messages": []}',
    "no content": b'{"messages": [{"role": "user", "content": null}]}',
    "deep": b'{"text": ' * 50_000,
    "a bomb": gzip.compress(bytes(2**28)),
    "a quote that is open": b'id,text\n1,"the',
    "one word": b"congress",
    "spaces": b" \n" * 99,
}
"""Contents that are no data, or too little of it."""
_BINARY = ("Latin-1", "UTF-16 that is cut", "zeros inside", "a bomb")
"""Those that are no text either."""
_WORDS = ("messages that are text",)
"""Those that can be meant as text whatever the format."""


def _of_data(name: str, folder: Path, count: int) -> Iterator[Damage]:
    path = folder / name
    plain = name.endswith((".txt", ".csv", ".tsv"))  # half of a text is a text
    for damage in of_file(path, name, count):
        yield Damage(damage.name, name, damage.apply, damage.legal or (plain and damage.name == "cut in half"))
    for what, data in _BYTES.items():
        packed = gzip.compress(data) if name.endswith(".gz") and what != "a bomb" else data
        yield Damage(what, name, partial(_put, packed), legal=what in _WORDS or (".txt" in name and what not in _BINARY))
    raw = path.read_bytes()
    for number in range(count):
        place = (number * 7919 + 13) % len(raw)
        yield Damage(f"byte {place} changed", name, partial(_put, raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]))


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _on_data(name: str) -> tuple[Command, ...]:
    return (
        Command("plan --data", lambda given, output: ("plan", given / "sound", *GPTQ, "--data", given / name, *SHORT, "--json"), planned),
        Command(
            "compress --data",
            lambda given, output: ("compress", given / "sound", *GPTQ, "--data", given / name, *SHORT, *SAVED, output),
            weights,
        ),
        Command("evaluate --data", lambda given, output: ("evaluate", given / "sound", "--data", given / name, *PERPLEXITY), scores),
    )


def _make_prompts(folder: Path) -> None:
    test_two_denoisers.pipeline().save_pretrained(folder / "sound")
    (folder / "gptq.yaml").write_text("steps:\n  - gptq: {scheme: W4A16_G32}\n")
    (folder / "prompts.jsonl").write_text('{"prompt": "cat"}\n{"prompt": "dog"}\n')


def _prompted(given: Path, output: Path) -> Words:
    data: Words = ("--data", given / "prompts.jsonl", "--steps", 2, "--samples", 2, "--height", 32, "--width", 32, "--num-frames", 1)
    return "compress", given / "sound", "--recipe", given / "gptq.yaml", *data, *SAVED, output


_SHOWN = [{"type": "image"}, {"type": "text", "text": "the people"}]
_ANSWER = {"role": "assistant", "content": "the world"}
_CHATS: Mapping[str, Mapping[str, Any]] = {
    "more places than images": {"messages": [{"role": "user", "content": [*_SHOWN, *_SHOWN]}, _ANSWER], "images": ["0.png"]},
    "more images than places": {"messages": [{"role": "user", "content": _SHOWN}, _ANSWER], "images": ["0.png", "1.png"]},
    "images without a place": {"messages": [{"role": "user", "content": "the people"}, _ANSWER], "images": ["0.png"]},
    "a place without images": {"messages": [{"role": "user", "content": _SHOWN}, _ANSWER], "images": []},
    "an image that is a folder": {"messages": [{"role": "user", "content": _SHOWN}, _ANSWER], "images": ["in"]},
    "an image that is text": {"messages": [{"role": "user", "content": _SHOWN}, _ANSWER], "images": ["text.txt"]},
    "an image by a number": {"messages": [{"role": "user", "content": _SHOWN}, _ANSWER], "images": [3]},
    "an image with a zero byte in its name": {"messages": [{"role": "user", "content": _SHOWN}, _ANSWER], "images": ["a\0b"]},
    "no answer": {"messages": [{"role": "user", "content": _SHOWN}], "images": ["0.png"]},
    "an answer before the question": {"messages": [_ANSWER, {"role": "user", "content": _SHOWN}], "images": ["0.png"]},
    "an unknown part": {"messages": [{"role": "user", "content": [*_SHOWN, {"type": "sound"}]}, _ANSWER], "images": ["0.png"]},
    "a part that is text": {"messages": [{"role": "user", "content": ["image", "the"]}, _ANSWER], "images": ["0.png"]},
    "text of 200,000 words": {
        "messages": [{"role": "user", "content": [_SHOWN[0], {"type": "text", "text": "people " * 200_000}]}, _ANSWER],
        "images": ["0.png"],
    },
}
"""First records of chats that no model reads."""


def _of_chats(folder: Path, count: int) -> Iterator[Damage]:
    path = folder / "chats.json"
    yield from of_file(path, path.name, 4 * count)
    yield from of_file(folder / "0.png", "0.png", count)
    others = json.loads(path.read_text())[1:]
    yield from (Damage(what, path.name, partial(_write, json.dumps([record, *others]))) for what, record in _CHATS.items())


_FILES = (
    *("text.txt", "text.jsonl", "text.json", "text.csv", "text.tsv", "text.parquet", "text.txt.gz", "text.jsonl.gz", "text.parquet.gz"),
    *("chat.jsonl", "chat.json", "answer.jsonl"),
)
KINDS = (
    Kind("recipe", _make_recipe, (Command("plan", _planned_recipe, planned), Command("compress", _compressed_recipe, weights)), _of_recipe),
    *(Kind(f"data {name}", partial(_make_data, name), _on_data(name), partial(_of_data, name)) for name in _FILES),
    Kind("prompts", _make_prompts, (Command("compress --data", _prompted, weights),), partial(_of_data, "prompts.jsonl")),
    Kind("chats about images", make_image_text, CHATTED, _of_chats),
)
"""Files."""


class Option(NamedTuple):
    """An option of a command, and a value for it."""

    command: str
    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.command} {self.name} {self.value[:30]!r}"


VALUES = (
    "",
    "x",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    str(2**70),
    "a" * 5000,
    "../../..",
    "/",
    "/dev/null",
    "\ud800",
    "x=",
    "=",
    "a.b=c",
    "re:(",
    "{",
    "{}",
)
"""Words that few options take."""


def options() -> Iterator[Option]:
    """Yield every option and argument of every command with each of the values."""
    for name, command in COMMANDS.commands.items():
        for parameter in command.params:
            if not getattr(parameter, "is_flag", False) and parameter.name != "help":
                word = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name
                yield from (Option(name, word, value) for value in VALUES)


def make_for_options(folder: Path) -> None:
    """Make the inputs that the commands of `words_with` work on."""
    text_file(folder / "text.txt", 200)
    model_folder(folder / "model", num_hidden_layers=1)
    recipe = {"name": "made", "steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
    aerogel.compress(folder / "model", recipe, output=folder / "written", measures=())
    image_pipelines.classes().save_pretrained(folder / "pipeline")


def words_with(option: Option, given: Path) -> list[str]:
    """Return a command line that is sound but for one option or argument; what it writes goes into the current folder."""
    base: dict[str, dict[str, object]] = {
        "compress": {"model": given / "model", "--recipe": "rtn-w4a16", "--scheme": "W4A16_G32", "--output": "out", "--no-evaluate": None},
        "plan": {"model": given / "model", "--recipe": "gptq-w4a16", "--scheme": "W4A16_G32", "--data": given / "text.txt"},
        "search": {"model": given / "pipeline", "--only": "fora", "--budget": "1.01", "--steps": 2, "--samples": 1},
        "evaluate": {"model": given / "model", "--measure": "perplexity", "--data": given / "text.txt"},
        "bench": {"model": given / "model", "--prompt": 4, "--new-tokens": 2, "--rounds": 1},
        "report": {"folder": given / "written", "--output": "out.html"},
        "export": {"folder": given / "written", "--format": "gptq", "--output": "out"},
        "push": {"folder": given / "written", "name": "owner/name"},
        "list": {"kind": "recipes"},
        "show": {"name": "gptq"},
    }
    words = {**base[option.command], option.name: option.value}
    named = [str(value) for key, value in words.items() if not key.startswith("--")]
    asked = [str(word) for key, value in words.items() if key.startswith("--") for word in ([key] if value is None else [key, value])]
    return [option.command, *asked, "--", *named]
