"""Names of tensors are those that the original folder has, also where transformers has called them otherwise over the years."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

import aerogel
from tests.tiny import FAMILIES

PARTS = ("_packed", "_scale", "_shape")


def test_an_older_layout_of_llava_keeps_its_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    FAMILIES["llava"].build().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(older, source / "model.safetensors", {"format": "pt"})
    recipe = {"name": "four-bits", "steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
    aerogel.compress(source, recipe, output=tmp_path / "out", measures=())
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names != older.keys()
    for part in PARTS:
        names = {name.removesuffix(part) for name in names}
    assert names == older.keys()
