"""Blocks are found where networks run them one after another, whatever they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.model.calls import Call
from aerogel.model.structure.examples import Example, examples_of
from aerogel.model.structure.placeholders import placeholder_weights
from aerogel.model.structure.towers import towers_of
from tests.folders import model_folder
from tests.tiny import FAMILIES, VARIANTS, opened

TINY = FAMILIES | VARIANTS
TOWERS = {
    "opt": ["model.decoder.layers"],
    "llava": ["model.vision_tower.encoder.layers", "model.language_model.layers"],
    "internvl": ["model.vision_tower.encoder.layer", "model.language_model.layers"],
    "qwen2_5_vl": ["model.visual.blocks", "model.language_model.layers"],
    "qwen3_vl_moe": ["model.visual.blocks", "model.language_model.layers"],
    "dit": ["transformer_blocks"],
    "pixart": ["transformer_blocks"],
    "sd3": ["transformer_blocks"],
    "flux": ["transformer_blocks", "single_transformer_blocks"],
    "wan": ["blocks"],
    "cogvideox": ["transformer_blocks"],
    "unet": [
        *("down_blocks.0.resnets", "down_blocks.0.downsamplers", "down_blocks.1.attentions", "down_blocks.1.resnets"),
        *("up_blocks.0.attentions", "up_blocks.0.resnets", "up_blocks.0.upsamplers", "up_blocks.1.resnets"),
        *("mid_block.attentions", "mid_block.resnets"),
    ],
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_towers_of_every_family_are_found(name: str) -> None:
    assert [tower.name for tower in opened(name).towers] == TOWERS.get(name, ["model.layers"])
    assert all(len(opened(name).module.get_submodule(tower.name)) == len(tower.blocks) for tower in opened(name).towers)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_weights_on_meta_are_enough(name: str) -> None:
    network, there = opened(name), opened(name)
    there.__dict__.pop("towers", None)
    for part in there.module.modules():
        for key, parameter in part.named_parameters(recurse=False):
            part._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    assert there.towers == network.towers


class Blocks(nn.Module):
    """A stem, blocks in a row, four experts, and heads that read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.cells = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return sum(head(x) for head in self.heads)  # type: ignore[return-value]


def test_a_module_of_the_users_own_is_watched_with_the_users_call() -> None:
    (tower,) = towers_of(Blocks(), [Example("", Call((torch.randn(2, 6),)))])
    assert (tower.name, tower.blocks) == ("cells", ("cells.0", "cells.1", "cells.2"))


def test_blocks_that_run_more_than_once_are_none() -> None:
    class Loop(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    assert not towers_of(Loop(), [Example("", Call((torch.randn(2, 6),)))])


def test_without_an_example_lists_of_alike_elements_count() -> None:
    assert [tower.name for tower in towers_of(Blocks(), [])] == ["cells", "heads"]


def test_everything_is_as_it_was_afterwards() -> None:
    module = TINY["qwen2_5_vl"].build()
    tensors = {name: (tensor, tensor.data_ptr()) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    towers_of(module, examples_of(module))
    with pytest.raises(RuntimeError, match="inside"), placeholder_weights(module):
        raise RuntimeError("inside")
    now = dict((*module.named_parameters(), *module.named_buffers()))
    assert all(now[name] is tensor and tensor.data_ptr() == place for name, (tensor, place) in tensors.items())
    assert not any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


def test_placeholders_take_no_memory_for_weights() -> None:
    module = nn.Linear(1 << 12, 1 << 12, device="meta")
    with placeholder_weights(module):
        assert module.weight.untyped_storage().nbytes() == 4
        assert module(torch.ones(3, 1 << 12)).shape == (3, 1 << 12)
    assert module.weight.is_meta


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_of_one_layer_keeps_its_tower_when_it_is_quantized(name: str, tmp_path: Path) -> None:
    """The weights of quantized layers are buffers."""
    model_folder(tmp_path / "model", name, num_hidden_layers=1)
    recipe = {"name": "rounded", "steps": [{"rtn": {"scheme": "W4A16_G32"}}]}
    aerogel.compress(tmp_path / "model", recipe, output=tmp_path / "out", measures=())
    assert open_model(tmp_path / "out").towers == open_model(tmp_path / "model").towers != ()
