"""Names go to disk and back as transformers converts them, and experts have the names that they have on disk."""

from __future__ import annotations

import pytest

from aerogel.io.names import Names
from aerogel.layers.experts import ExpertLayout
from tests.tiny import FAMILIES


@pytest.mark.parametrize(
    ("name", "memory", "disk"),
    [
        ("mixtral", "model.layers.0.mlp.experts.3.w1.weight", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("mixtral", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("llava", "lm_head.weight", "language_model.lm_head.weight"),
        ("llava", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("qwen2_5_vl", "model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("unet", "mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"),
    ],
)
def test_names_go_to_disk_and_back(name: str, memory: str, disk: str) -> None:
    names = Names.of(FAMILIES[name].build())
    assert names.on_disk(memory) == disk
    assert names.in_memory(disk) == memory
    assert names.in_memory(memory) == memory


def test_older_names_are_read_and_not_written() -> None:
    names = Names.of(FAMILIES["llava"].build())
    old = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert names.in_memory(old) == "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    bert = Names.of(FAMILIES["llama"].build())
    assert bert.in_memory("model.LayerNorm.gamma") == "model.LayerNorm.weight"
    assert bert.on_disk("model.LayerNorm.weight") == "model.LayerNorm.weight"


def test_projections_of_experts_are_called_as_on_disk() -> None:
    found = {name: Names.of(FAMILIES[name].build()).experts("model.layers.0.mlp.experts") for name in ("mixtral", "qwen3_moe", "gpt_oss")}
    assert found == {"mixtral": ExpertLayout("w1", "w3", "w2"), "qwen3_moe": ExpertLayout(), "gpt_oss": ExpertLayout(fused_on_disk=True)}
