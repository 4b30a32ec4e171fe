"""What is said of folders and numbers that cannot be: the message, beside the corpus of tests/faults that only asks for one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.judged import Ended, run_words
from tests.folders import model_folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("sound") / "model", num_hidden_layers=1)


def run(*words: object) -> Ended:
    ended = run_words([str(word) for word in words])
    assert ended.fault is None
    return ended


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b"}}', "{}"])
def test_indices_of_weights(content: str, sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in run("show", folder).told


def test_more_layers_than_the_weights_can_have(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**7}))
    assert "num_hidden_layers is 10000000, and the checkpoint has 12 tensors" in run("show", folder).told


@pytest.mark.parametrize("words", [("--seed", 2**70), ("--seed", -1), ("--threads", 10**6), ("--threads", 0)])
def test_numbers_out_of_bounds(words: tuple[str, int], sound: Path, tmp_path: Path) -> None:
    assert run("compress", sound, "--recipe", "rtn-w4a16", "--output", tmp_path / "out", *words).code == 2


def test_sequences_longer_than_the_model_has_positions(sound: Path) -> None:
    recipe = ("--recipe", "gptq-w4a16", "--scheme", "W4A16_G32")
    refused = run("plan", sound, *recipe, "--length", 4096)
    assert "sequences of the calibration have 4096 tokens, and the model has 128 positions" in refused.told
    assert refused.code == 2
    assert run("plan", sound, *recipe).code == 0, "by default they are as long as they can be"
