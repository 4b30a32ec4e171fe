"""Damaged and absurd files end every command with one line and exit code 2: a seeded corpus over configurations, headers and records."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import aerogel
from aerogel.cli.commands import app
from tests.folders import model_folder

Damage = Callable[[Path], None]
VALUES: list[Any] = [None, True, -1, 0, 10**7, 1e308, "x", "", [], [1, 2], {}, {"x": 1}]
"""Values of the wrong kind or size."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same compressed."""
    folder = tmp_path_factory.mktemp("sound")
    model_folder(folder / "model", num_hidden_layers=1)
    aerogel.compress(folder / "model", "rtn-w4a16", overrides=["rtn.scheme=W4A16_G32"], output=folder / "out", measures=())
    return folder


def run(*words: object) -> Any:
    """Run a command; raises AssertionError where it ends with anything but success or one line and exit code 2."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exception is None or isinstance(found.exception, SystemExit), repr(found.exception)
    assert found.exit_code in (0, 2), found.output
    if found.exit_code == 2:
        told = [line for line in found.output.splitlines() if "error: " in line.lower()]
        assert len(told) >= 1, found.output
    return found


def seeds(usual: int, count: int) -> list[Any]:
    """So many seeds, of which the usual tests run the first."""
    return [pytest.param(seed, marks=pytest.mark.slow) if seed >= usual else seed for seed in range(count)]


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def replaced(settings: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested JSON with another value at a place."""
    made = json.loads(json.dumps(settings))
    part = made
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return made


def places(settings: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in nested JSON."""
    inner = settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    return [found for key, value in inner for found in ((*at, key), *places(value, (*at, key)))]


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', "null", "[" * 100_000, "\xff\xfe", '{"model_type": 3}', "{}"])
@pytest.mark.parametrize("name", ["config.json", "aerogel.json", "tokenizer_config.json", "generation_config.json"])
def test_files_that_hold_no_such_json(name: str, text: str, sound: Path, tmp_path: Path) -> None:
    folder = copied(sound / "out", tmp_path / "out")
    (folder / name).write_bytes(text.encode("latin-1"))
    commands = {"aerogel.json": "report", "config.json": "show"}
    found = run(commands.get(name, "evaluate"), folder, *(() if name in commands else ("--measure", "size")))
    if name in commands:
        assert found.exit_code == 2


@pytest.mark.parametrize("seed", seeds(100, 400))
def test_configurations_with_absurd_values(seed: int, sound: Path, tmp_path: Path) -> None:
    folder, draw = copied(sound / "out", tmp_path / "out"), random.Random(seed)
    settings = json.loads((folder / "config.json").read_text())
    place = draw.choice([found for found in places(settings) if seed % 2 or found[0] == "quantization_config"])
    (folder / "config.json").write_text(json.dumps(replaced(settings, place, draw.choice(VALUES))))
    run("show", folder)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "overlap": lambda header: _with(header, 1, "data_offsets", [0, 8]),
    "a negative shape": lambda header: _with(header, 0, "shape", [-1, 4]),
    "a huge shape": lambda header: _with(header, 0, "shape", [2**62, 2**62]),
    "no shape": lambda header: _with(header, 0, "shape", None),
    "another dtype": lambda header: _with(header, 0, "dtype", "F64"),
    "a dtype that is none": lambda header: _with(header, 0, "dtype", ["F32"]),
    "offsets backwards": lambda header: _with(header, 0, "data_offsets", [64, 0]),
    "a tensor that is a list": lambda header: {**header, next(iter(header)): []},
    "a list": lambda header: [header],
    "no tensors": lambda header: {},
}


def _with(header: dict[str, Any], number: int, key: str, value: Any) -> dict[str, Any]:
    name = list(header)[number]
    return {**header, name: {**header[name], key: value}}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_weights(kind: str, sound: Path, tmp_path: Path) -> None:
    folder = copied(sound / "model", tmp_path / "model")
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = {name: item for name, item in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
    made = json.dumps(HEADERS[kind](header)).encode()
    file.write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])
    assert run("plan", folder, "--recipe", "rtn-w4a16", "--scheme", "W4A16_G32").exit_code == 2


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}', "{}"])
def test_indices_of_weights(content: str, sound: Path, tmp_path: Path) -> None:
    folder = copied(sound / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert run("show", folder).exit_code == 2


@pytest.mark.parametrize("seed", seeds(60, 200))
def test_records_with_absurd_values(seed: int, sound: Path, tmp_path: Path) -> None:
    folder, draw = copied(sound / "out", tmp_path / "out"), random.Random(seed)
    record = json.loads((folder / "aerogel.json").read_text())
    (folder / "aerogel.json").write_text(json.dumps(replaced(record, draw.choice(places(record)), draw.choice(VALUES))))
    run("report", folder)


def test_more_layers_than_the_weights_can_have(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound / "model", tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**7}))
    assert "num_hidden_layers is 10000000, and the checkpoint has 12 tensors" in run("show", folder).output


@pytest.mark.parametrize("words", [("--seed", 2**70), ("--seed", -1), ("--threads", 10**6), ("--threads", 0)])
def test_numbers_out_of_bounds(words: tuple[str, int], sound: Path, tmp_path: Path) -> None:
    assert run("compress", sound / "model", "--recipe", "rtn-w4a16", "--output", tmp_path / "out", *words).exit_code == 2


def test_sequences_longer_than_the_model_has_positions(sound: Path) -> None:
    recipe = ("--recipe", "gptq-w4a16", "--scheme", "W4A16_G32")
    refused = run("plan", sound / "model", *recipe, "--length", 4096)
    assert "sequences of the calibration have 4096 tokens, and the model has 128 positions" in refused.output
    assert refused.exit_code == 2
    assert run("plan", sound / "model", *recipe).exit_code == 0, "by default they are as long as they can be"
