"""Folders of before compressed-tensors 0.18 hold the weights that they held; what is written is packed as it is since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aerogel.engine.exporting import source_of
from aerogel.engine.opening import load
from aerogel.export.compressed_tensors import CompressedTensors
from aerogel.export.exporter import Master
from aerogel.io.packed_words import FIRST, padded
from aerogel.layers.linear import QuantLinear
from aerogel.numerics.packing import unpack
from tests.numerics.test_packing import padded as padded_words
from tests.saved import network, save

SCHEMES = [
    "W3A16_G32",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("W3A16_G32_ASYM", "W3A16_CHANNEL_ASYM")),
    "W4A16_G32_ASYM",
]


def as_before(folder: Path, bits: int) -> None:
    """Write the folder as earlier releases did: whole codes in words, no version."""
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    assert config["quantization_config"].pop("version") == FIRST
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("weight_packed", "weight_zero_point"))]:
        along = int(name.endswith("weight_packed"))
        count = int(tensors[f"{name.rpartition('.')[0]}.weight_shape"][along])
        codes = unpack(tensors[name], bits, count, along)
        words = torch.tensor([padded_words(row, bits) for row in (codes if along else codes.T).tolist()], dtype=torch.int32)
        tensors[name] = words if along else words.T.contiguous()
    save_file(tensors, file, {"format": "pt"})


def weights(folder: Path, **options: Any) -> dict[str, Tensor]:
    opened = load(folder, **options)
    if opened.checkpoint is not None:
        for name, block in opened.blocks().items():
            opened.checkpoint.materialise(block, name)
    return {name: part.dequantized(torch.float32) for name, part in opened.module.named_modules() if isinstance(part, QuantLinear)}


@pytest.fixture
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of today and the same of before."""
    for name in ("now", "before"):
        save(network(request.param), tmp_path / name)
    as_before(tmp_path / "before", int(request.param[1]))
    return tmp_path / "now", tmp_path / "before"


@pytest.mark.parametrize("folders", SCHEMES, indirect=True)
def test_a_folder_of_before_opens_with_its_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    now, before = folders
    wanted = weights(now)
    for lazy in (False, True):
        found = weights(before, lazy=lazy)
        assert found.keys() == wanted.keys() != set()
        assert all(found[name].equal(weight) for name, weight in wanted.items())
    master = Master.open(source_of(before))
    assert all(master.dequantized(name).equal(weight) for name, weight in wanted.items())
    CompressedTensors().write(source_of(before), tmp_path / "out")
    written, same = load_file(next((tmp_path / "out").glob("*.safetensors"))), load_file(now / "model.safetensors")
    assert written.keys() == same.keys()
    assert all(written[name].equal(tensor) for name, tensor in same.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["version"] == FIRST


@pytest.mark.parametrize(
    ("version", "expected"),
    [(None, True), ("", True), ("0.17.1", True), ("0.9.4", True), ("0.18.0", False), ("0.20.1", False), ("1.0", False)],
)
def test_the_version_of_the_config_decides(version: str | None, expected: bool) -> None:
    assert padded({} if version is None else {"version": version}) is expected
