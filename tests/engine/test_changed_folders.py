"""A folder whose weights or configuration were changed after it was written is refused, whichever way it is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import aerogel
from aerogel.engine import exporting, scores
from aerogel.errors import AerogelError
from aerogel.io.record import files
from tests.folders import model_folder
from tests.registration import registered


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same compressed with a policy."""
    folder = tmp_path_factory.mktemp("changed")
    model_folder(folder / "model", num_hidden_layers=1)
    recipe = {"name": "tested", "steps": [{"rtn": {"scheme": "W4A16_G32"}}, {"attention_quant": {"bits": 8}}]}
    aerogel.compress(folder / "model", recipe, output=folder / "out", measures=())
    return folder


def _cached(folder: Path) -> None:
    with aerogel.cached(folder.parent / "model", folder):
        pass


def _registered(folder: Path) -> None:
    with registered():
        transformers.AutoModelForCausalLM.from_pretrained(folder)


WAYS: dict[str, Callable[[Path], Any]] = {
    "load": aerogel.load,
    "evaluate": lambda folder: scores.measure_models(str(folder), None, ["size"]),
    "evaluate against it": lambda folder: scores.measure_models(str(folder.parent / "model"), str(folder), ["size"]),
    "export": lambda folder: exporting.export(folder, "gptq", folder.parent / "exported"),
    "compress again": lambda folder: aerogel.compress(folder, "magnitude-2of4-w4a16", measures=()),
    "cached": _cached,
    "transformers": _registered,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_byte_of_the_weights(way: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(shelf, tmp_path / "shelf")) / "out"
    for name in files.read(folder).checksums:
        file = folder / name
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    with pytest.raises(AerogelError, match=r"\.safetensors is not what aerogel\.json has the checksum of"):
        WAYS[way](folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 2), ("num_hidden_layers", 0), ("intermediate_size", 32), ("vocab_size", 7), ("model_type", "none")],
)
def test_a_configuration_that_is_not_of_the_weights(key: str, value: Any, shelf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shelf / "out", tmp_path / "out"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    for way in ("load", "export"):
        with pytest.raises(AerogelError):
            WAYS[way](folder)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("way", ["load", "evaluate", "export", "cached", "transformers"])
def test_a_record_of_a_later_release(way: str, shelf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shelf, tmp_path / "shelf")) / "out"
    record = json.loads((folder / "aerogel.json").read_text())
    (folder / "aerogel.json").write_text(json.dumps(record | {"schema": 99, "unknown": {}}))
    with pytest.raises(AerogelError, match=r"aerogel\.json has schema 99 and this release reads up to \d+; upgrade aerogel to open it"):
        WAYS[way](folder)


def test_a_component_is_checked_by_the_record_of_its_pipeline(shelf: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(shelf / "out", pipeline / "transformer")
    (pipeline / "transformer" / "aerogel.json").rename(pipeline / "aerogel.json")
    record = json.loads((pipeline / "aerogel.json").read_text())
    sums = {f"transformer/{name}": checksum for name, checksum in record["checksums"].items()} | {"vae/model.safetensors": "sha256:0"}
    (pipeline / "aerogel.json").write_text(json.dumps(record | {"checksums": sums}))
    files.verify(pipeline / "transformer")
    (pipeline / "transformer" / "model.safetensors").write_bytes(b"")
    with pytest.raises(AerogelError, match=r"transformer/model\.safetensors is not what aerogel\.json has the checksum of"):
        files.verify(pipeline / "transformer")
