"""The master format written anew: the same tensors, none of our own files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from aerogel.engine.exporting import source_of
from aerogel.export.compressed_tensors import CompressedTensors
from aerogel.layers.linear import QuantLinear
from aerogel.layers.scaled_input import ScaledInput
from tests.saved import network, save


def test_tensors_and_configuration_stay_and_our_own_files_go(tmp_path: Path) -> None:
    save(network(kind="mixtral"), tmp_path / "master")
    (tmp_path / "master/aerogel.json").write_text('{"model": {"name": "a model"}}')
    CompressedTensors(max_shard_size=50_000).write(source_of(tmp_path / "master"), tmp_path / "out")
    before, after = load_file(tmp_path / "master/model.safetensors"), {}
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        after |= load_file(path)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "master/config.json").read_text()
    assert not (tmp_path / "out/aerogel.json").exists()


def test_scaled_inputs_are_refused_by_name(tmp_path: Path) -> None:
    given = network()
    name = "model.layers.0.self_attn.q_proj"
    inner = given.module.get_submodule(name)
    assert isinstance(inner, QuantLinear)
    given.module.set_submodule(name, ScaledInput(inner, torch.ones(inner.in_features)))
    save(given, tmp_path / "master")
    assert CompressedTensors().refuse(source_of(tmp_path / "master")) == [
        f"{name} divides its input by a scale for each channel, which compressed-tensors cannot say"
    ]
