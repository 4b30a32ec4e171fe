"""Damages of files, generated from what a file holds: of any file, of JSON, of the header of weights; the same for the same seed."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**7, 1e308, "x", "", [], [1, 2], {}, {"x": 1}, float("nan"))
"""Values of the wrong kind or size."""
_OPTIONAL = ("tokenizer_config.json",)
"""Files without which, or with others in their place, an input is another one that is as sound."""
_TEXTS = ("", "{", "[1, 2]", '"x"', "null", "{}", "[" * 100_000, "\xff\xfe", '{"model_type": 3}')


@dataclass(frozen=True)
class Damage:
    """One change of an input that makes it wrong."""

    name: str
    file: str
    """The file that is changed, relative to the input."""
    apply: Callable[[Path], object]
    """Changes the file."""
    legal: bool = False
    """True where what comes out may be something else than without the damage: another value that could be meant."""

    def is_named_in(self, told: str) -> bool:
        """Return True where an error names the input: the file, a folder that it lies in, or what the file names itself, quoted."""
        return any(part in told for part in (*Path(self.file).parts, f"'{Path(self.file).stem}'", "pattern 're:")) or "/given" in told

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def of_folder(folder: Path, count: int, seed: int = 0) -> Iterator[Damage]:
    """Yield the damages of every file of a folder: `count` seeded ones of each JSON file beside the fixed ones."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield from of_file(path, str(path.relative_to(folder)), count, seed)


def of_file(path: Path, name: str, count: int, seed: int = 0) -> Iterator[Damage]:
    """Yield the damages of one file."""
    optional = path.name in _OPTIONAL
    for what, change in _ANY.items():
        yield Damage(what, name, change, legal=optional and what == "missing")
    if path.suffix == ".safetensors":
        yield from (Damage(f"header: {what}", name, partial(_with_header, change)) for what, change in HEADERS.items())
    if path.suffix == ".json":
        for text in _TEXTS:
            yield Damage(f"content {text[:20]!r}", name, partial(_write, text.encode("latin-1")), legal=optional and text.endswith("}"))
        yield from values_of(json.loads(path.read_text()), name, count, seed)


def values_of(content: Any, name: str, count: int, seed: int = 0) -> Iterator[Damage]:
    """Yield damages of JSON: a value somewhere replaced, or left out."""
    draw, found = random.Random(f"{name} {seed}"), places(content)
    for _ in range(count if found else 0):
        place, value = draw.choice(found), draw.choice(VALUES)
        before = at(content, place)
        at_place = ".".join(map(str, place))
        if draw.random() < 0.2 and isinstance(place[-1], str):
            yield Damage(f"without {at_place}", name, partial(_edit, place, None, True), legal=True)
        elif value != before:
            legal = value is None or _kind(value) == _kind(before)
            yield Damage(f"{at_place} = {value!r}", name, partial(_edit, place, value, False), legal)


def places(content: Any, inside: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return all places in nested JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in inner for found in ((*inside, key), *places(value, (*inside, key)))]


def at(content: Any, place: tuple[Any, ...]) -> Any:
    """Return the value at a place in nested JSON."""
    for key in place:
        content = content[key]
    return content


def _kind(value: Any) -> str:
    """The kind of a JSON value; the numbers are of one kind, and so are true and false, which Python takes for 1 and 0."""
    return "number" if isinstance(value, int | float) else type(value).__name__


def _edit(place: tuple[Any, ...], value: Any, leave_out: bool, path: Path) -> None:
    content = json.loads(path.read_text())
    part = at(content, place[:-1])
    if leave_out:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    path.write_text(json.dumps(content))


def _write(data: bytes, path: Path) -> None:
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 3])


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _device_instead(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


_ANY: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut in half": _cut,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": _folder_instead,
    "a pipe": _pipe_instead,
    "a link to itself": _loop_instead,
    "an endless device": _device_instead,
}

HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "overlap": lambda header: with_entry(header, 1, "data_offsets", [0, 8]),
    "a negative shape": lambda header: with_entry(header, 0, "shape", [-1, 4]),
    "a huge shape": lambda header: with_entry(header, 0, "shape", [2**62, 2**62]),
    "no shape": lambda header: with_entry(header, 0, "shape", None),
    "another dtype": lambda header: with_entry(header, 0, "dtype", "F64"),
    "a dtype of the same size": lambda header: with_entry(header, 0, "dtype", "I32"),
    "a dtype that is none": lambda header: with_entry(header, 0, "dtype", ["F32"]),
    "offsets backwards": lambda header: with_entry(header, 0, "data_offsets", [64, 0]),
    "a tensor that is a list": lambda header: {**header, next(iter(header)): []},
    "another name": lambda header: {"x" + name if not number else name: item for number, (name, item) in enumerate(header.items())},
    "a shape of one dimension more": lambda header: with_entry(header, 0, "shape", [1, *next(iter(header.values()))["shape"]]),
    "a list": lambda header: [header],
    "no tensors": lambda header: {},
}
"""By what is wrong: header of a safetensors file without its metadata -> what takes its place."""


def with_entry(header: dict[str, Any], number: int, key: str, value: Any) -> dict[str, Any]:
    """Return a header with another value in one of its entries."""
    name = list(header)[number % len(header)]
    return {**header, name: {**header[name], key: value}}


def _with_header(change: Callable[[dict[str, Any]], Any], path: Path) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = {name: item for name, item in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
    made = json.dumps(change(header)).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])


def copied(source: Path, target: Path) -> Path:
    """Return a copy of a file or folder."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copyfile(source, target)
    return target
