"""The models of a pipeline beside its denoiser: what the library would make up or trip over is one error that names it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from aerogel.engine.opening import open_model
from aerogel.errors import AerogelError
from tests import image_pipelines


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    image_pipelines.classes().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "pipeline"))


def refused(folder: Path) -> str:
    with pytest.raises(AerogelError) as error:
        open_model(folder, device="cpu")
    return str(error.value)


def test_weights_that_are_not_there_are_not_made_up(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert refused(folder) == f"{folder}/vae: no weights for decoder.conv_in.bias; fetch its files again"


def test_integers_where_floats_belong_are_no_weights(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    assert f"{file}: " in refused(folder)
    assert "is torch.int32, the model expects torch.float32" in refused(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [("scheduler/scheduler_config.json", "[" * 100_000), ("vae/config.json", "null"), ("vae/config.json", '{"block_out_channels": true}')],
)
def test_whatever_the_library_trips_over_is_one_line(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    assert str(folder) in refused(folder)


def test_an_index_without_a_part_is_named(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": None}))
    assert f"{folder}: diffusers cannot open this pipeline" in refused(folder)


@pytest.mark.parametrize("entry", [math.nan, 3, "x", {"x": 1}])
def test_an_index_with_something_else_for_a_denoiser_is_named(entry: Any, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"transformer": entry}))
    assert refused(folder).startswith(f"{folder}/model_index.json: transformer is {entry!r}, expected a library and a class")


def test_a_denoiser_that_names_no_class_is_named(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("{}")
    assert refused(folder) == f"{folder}/transformer/config.json names no class of diffusers (_class_name); fetch the file again"


def test_files_that_are_no_files_are_not_left_out(folder: Path) -> None:
    place = folder / "scheduler" / "scheduler_config.json"
    place.unlink()
    place.symlink_to(place.name)
    assert refused(folder) == f"{place} is no regular file; fetch or copy the file again"
