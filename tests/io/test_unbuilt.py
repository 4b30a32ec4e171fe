"""What a checkpoint has beside the modules of its class, such as layers of multi-token prediction, is kept as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import aerogel
from aerogel.engine.planning import plan
from aerogel.engine.structure import structure_of
from aerogel.io.checkpoint import Checkpoint
from aerogel.io.unbuilt import Unbuilt
from tests.tiny import FAMILIES, output

RTN = {"steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
MORE = {
    "model.layers.61.eh_proj.weight": torch.randn(64, 128).bfloat16(),
    "model.layers.61.enorm.weight": torch.randn(64),
    "model.layers.61.mlp.experts.0.up_proj.weight": torch.randn(32, 64),
}
"""As DeepSeek-V3 has them: a layer behind the last one."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    FAMILIES["deepseek_v3"].build().save_pretrained(tmp_path / "in")
    (file,) = (tmp_path / "in").glob("*.safetensors")
    save_file(load_file(file) | MORE, file, metadata={"format": "pt"})
    return tmp_path / "in"


def more_of(folder: Path) -> dict[str, Tensor]:
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if ".61." in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_they_are_in_the_output_and_in_that_of_the_output(folder: Path, tmp_path: Path) -> None:
    aerogel.compress(folder, RTN, output=tmp_path / "out", measures=())
    assert same(more_of(tmp_path / "out"), MORE)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"re:model\.layers\.61(\.|$)" in config["ignore"]
    network = aerogel.load(tmp_path / "out", lazy=False)
    (call,) = FAMILIES["deepseek_v3"].calls(1)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(output(opened, call), output(network.module, call), rtol=0, atol=1e-4)
    again = aerogel.compress(tmp_path / "out", {"steps": [{"reduced_topk": {"k": 1}}]}, samples=[call], measures=())
    again.save(tmp_path / "again")
    assert same(more_of(tmp_path / "again"), MORE)


def test_plan_and_structure_name_them(folder: Path) -> None:
    planned = plan(folder, RTN)
    assert [remark for remark in planned.remarks if remark.startswith("model.layers.61: the model's class has no module for it")]
    assert structure_of(aerogel.load(folder))["not_built"] == ["model.layers.61"]
    without = plan(folder.rename(folder.parent / "moved"), {"steps": [{"rotate": {}}, *RTN["steps"]]})
    assert [remark for remark in without.remarks if remark.startswith("rotate: leaves model.layers.61 out")]


def test_a_rotated_model_does_without_them(folder: Path, tmp_path: Path) -> None:
    """They read the stream as it was, and nobody knows where."""
    aerogel.compress(folder, {"steps": [{"rotate": {}}, *RTN["steps"]]}, output=tmp_path / "out", measures=())
    assert not more_of(tmp_path / "out")


def test_the_outermost_modules_are_named(tmp_path: Path) -> None:
    names = [
        "model.layers.0.a.weight",
        "model.layers.1.a.weight",
        "model.layers.1.b.weight",
        "mtp.fc.weight",
        "mtp.layers.0.a.weight",
        "lone",
    ]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    unbuilt = Unbuilt.of(Checkpoint.open(tmp_path), set(names[:2]))
    assert unbuilt is not None
    assert set(unbuilt.parts) == {"model.layers.1.b", "mtp", "lone"}
    assert not unbuilt.ignored, "none holds a matrix"
    assert Unbuilt.of(Checkpoint.open(tmp_path), set(names)) is None
