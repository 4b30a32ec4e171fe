"""Renames go to disk and back, and conditions on the config are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model.family import Edge, Family, Residual, Tower

LLAVA: Family = catalog.find("families", "llava")
MIXTRAL: Family = catalog.find("families", "mixtral")


@pytest.mark.parametrize(
    ("family", "memory", "disk"),
    [
        (MIXTRAL, "model.layers.0.mlp.experts.3.w1.weight", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        (MIXTRAL, "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        (LLAVA, "lm_head.weight", "language_model.lm_head.weight"),
        (LLAVA, "model.language_model.norm.weight", "language_model.model.norm.weight"),
        (LLAVA, "model.vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        (catalog.find("families", "qwen2_5_vl"), "model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        (catalog.find("families", "llama"), "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_names_go_to_disk_and_back(family: Family, memory: str, disk: str) -> None:
    assert family.on_disk(memory) == disk
    assert family.in_memory(disk) == memory
    assert family.in_memory(memory) == memory


def test_lists_of_the_family_are_written_out() -> None:
    unet: Family = catalog.find("families", "unet")
    assert unet.expand_patterns(["a.*", "@ends"]) == ("a.*", "conv_in", "conv_out")
    assert {"time_embedding.*", "mid_block.resnets.*.time_emb_proj"} < set(unet.expand_patterns(["@time_path"]))
    with pytest.raises(AerogelError, match=r"the unet family has no list @end; it has @time_path, @ends, @released_tfmq"):
        unet.expand_patterns(["@end"])
    with pytest.raises(AerogelError, match="the llava family has no list @ends; it has none"):
        LLAVA.expand_patterns(["@ends"])


def test_an_older_layout_on_disk_is_known_too() -> None:
    old = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert LLAVA.in_memory(old) == "model.vision_tower.encoder.layers.0.mlp.fc1.weight"


def test_a_beginning_is_not_found_inside_a_name() -> None:
    family = Family("toy", ("toy",), (Tower("", "blocks.*"),), renames=(("model.visual.", "visual."),))
    assert family.in_memory("model.audio_visual.norm.weight") == "model.audio_visual.norm.weight"
    assert family.in_memory("extra.visual.norm.weight") == "extra.visual.norm.weight"


def test_conditions_ask_the_config() -> None:
    when = (("activation", "relu"), ("extra_width", None))
    for part in (Edge("fc1", ("fc2",), when=when), Residual((), (), "norm", "head", when=when)):
        assert part.holds(SimpleNamespace(activation="relu", extra_width=None))
        assert part.holds(SimpleNamespace(activation="relu"))
        assert not part.holds(SimpleNamespace(activation="gelu"))
        assert not part.holds(None)
    assert Edge("fc1", ("fc2",)).holds(None)
