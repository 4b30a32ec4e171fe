"""Shipped recipes that drop positions of long prompts: the folder brings both policies back, and they act together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aerogel
from aerogel import catalog
from aerogel.inference.generate import Generator
from aerogel.layers.linear import QuantLinear
from aerogel.methods.tokens.policy import DroppingPolicy
from aerogel.recipe import Recipe
from tests.methods.prompt_tokens.prompts import LENGTH, deep, prompt

RECIPES = [
    name
    for name in catalog.names("recipes")
    if any(isinstance(step.method, DroppingPolicy) and step.method.drops_text for step in Recipe.parse(name).steps)
]
SMALLER = [f"prompt_pruning.{option}" for option in ("min_length=64", "block=8", "sub_block=4", "local=8", "q_window=4")]
NEW = 4


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    network, samples = deep(), [prompt(2)]
    result = aerogel.compress(network, Recipe.parse(recipe, SMALLER), samples=samples, output=tmp_path / "out", measures=())
    pruned = result.policies[-1].state
    assert 0 < pruned.kept < 0.8
    ours = aerogel.load(tmp_path / "out", lazy=False)
    assert any(isinstance(part, QuantLinear) for part in ours.module.modules())
    ids_BN = prompt().kwargs["input_ids"]
    made = Generator(ours, 1, LENGTH + NEW).generate(ids_BN, NEW)
    assert (made.path, made.reason) == ("fast_decoder", None)
    with torch.no_grad():
        cache = ours.module(input_ids=ids_BN, use_cache=True).past_key_values
    lengths = [layer.stored_keys.length for layer in cache.layers]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.3 * lengths[0] == 0.3 * LENGTH
    assert cache.layers[0].stored_keys.bytes < cache.layers[0].stored_values.bytes * 1.01 < 0.5 * 4 * LENGTH * ours.config.hidden_size


def test_shipped_prompts_are_long_enough_by_default() -> None:
    assert RECIPES == ["prompt-pruning-w4a16-kv8"]
    with pytest.raises(aerogel.AerogelError, match="prompts are pruned from 4096 on; give longer ones"):
        aerogel.compress(deep(), RECIPES[0], samples=[prompt()], measures=())
