"""Every shipped recipe for denoisers runs as it is, but for fewer optimiser steps, and its folder answers as the network in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import aerogel
from aerogel import catalog
from aerogel.data.denoising import Denoising, record
from aerogel.engine import policies
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.recipe import Recipe
from aerogel.runtime.feature_cache.schedule import Schedule
from tests.engine.test_expert_recipes import RECIPES
from tests.engine.test_image_token_recipes import RECIPES as FEWER_TOKENS
from tests.engine.test_prompt_recipes import RECIPES as LONG_PROMPTS
from tests.engine.test_shipped_recipes import LANGUAGE
from tests.methods.diffusion.test_fsc import calls
from tests.methods.structured.test_prune_ffn_channels import RECIPES as FEWER_CHANNELS
from tests.methods.structured.test_shortgpt import RECIPES as FEWER_LAYERS
from tests.runtime.feature_cache.test_replay import dit_pipeline
from tests.tiny import FAMILIES, output

# Largest relative error of what a small UNet with random weights predicts.
CLOSE = {
    "qdiffusion-w4a8": 0.25, "tfmq-w4a32": 0.25, "tfmq-w4a8": 0.25, "tfmq-w8a8": 0.05, "tfm-w4a8-cache": 0.25, "tfm-w4a8-select": 0.25,
    "brecq-w4a8-token": 0.25, "harmonica": 1.0, "harmonica-w8a8": 1.0, "harmonica-w4a8": 1.0,
}  # fmt: skip


def quicker(name: str) -> list[str]:
    """Overrides that leave the optimisers little to do."""
    methods = {step.name for step in Recipe.parse(name).steps}
    few = {"tiar": ("steps=50",), "brecq": ("steps=50", "batch=4", "rate=0.02"), "activation_ranges": ("steps=10", "batch=4")}
    return [f"{method}.{option}" for method, options in few.items() if method in methods for option in options]


def test_every_recipe_is_tested() -> None:
    elsewhere = {*LANGUAGE, *RECIPES, *FEWER_TOKENS, *LONG_PROMPTS, *FEWER_LAYERS, *FEWER_CHANNELS}
    assert set(catalog.names("recipes")) == CLOSE.keys() | elsewhere


SLOW = ("tfm-w4a8-select", "tfmq-w8a8", "tfmq-w4a8", "tfmq-w4a32", "qdiffusion-w4a8")
"""Recipes whose methods another one in the default run, or the matrix of methods, has too."""


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in CLOSE
        if name != "brecq-w4a8-token" and "harmonica" not in name
    ],
)
def test_recipe_on_a_unet(recipe: str, tmp_path: Path) -> None:
    tiny = FAMILIES["unet"]
    result = aerogel.compress(tiny.build(), recipe, samples=calls(), overrides=quicker(recipe), output=tmp_path / "out", measures=())
    plain, reopened = aerogel.load(tiny.build()), aerogel.load(tmp_path / "out", lazy=False)
    layers = {name: part for name, part in result.network.module.named_modules() if isinstance(part, QuantLinear)}
    assert all((part.scheme.inputs is not None) == (recipe != "tfmq-w4a32") for part in layers.values())
    with policies.on(result.network, result.policies):
        for call in calls():
            before, answer = output(plain.module, call), output(result.network.module, call)
            assert 0 < (answer - before).norm() < CLOSE[recipe] * before.norm()
            assert (output(reopened.module, call) - answer).norm() <= 1e-6 * answer.norm()


def test_recipe_for_transformers(tmp_path: Path) -> None:
    recipe, tiny = "brecq-w4a8-token", FAMILIES["dit"]
    result = aerogel.compress(tiny.build(), recipe, samples=tiny.calls(2), overrides=quicker(recipe), output=tmp_path / "out", measures=())
    plain, reopened = aerogel.load(tiny.build()), aerogel.load(tmp_path / "out", lazy=False)
    for call in tiny.calls(2):
        before, answer = output(plain.module, call), output(result.network.module, call)
        assert 0 < (answer - before).norm() < CLOSE[recipe] * before.norm()
        assert (output(reopened.module, call) - answer).norm() <= 1e-6 * answer.norm()


@pytest.mark.parametrize("opened", ["live", "from a folder"])
@pytest.mark.parametrize("recipe", ["harmonica", "harmonica-w8a8", "harmonica-w4a8"])
def test_recipe_for_caching(recipe: str, opened: str, tmp_path: Path) -> None:
    """Counted in multiply-accumulates: seconds of a network as small as this are its overhead."""
    wanted, quick = Denoising(count=2, steps=5, batch=2), ["harmonica.trajectories=2", "harmonica.by=macs", *quicker(recipe)]
    given: Any = dit_pipeline().processor
    if opened == "from a folder":
        given.save_pretrained(tmp_path / "in")
        given = tmp_path / "in"
    result = aerogel.compress(given, recipe, samples=wanted, overrides=quick, output=tmp_path / "out", measures=())
    layers = [part for part in result.network.module.modules() if isinstance(part, QuantLinear)]
    assert all(part.scheme.inputs is not None for part in layers)
    assert bool(layers) == (recipe != "harmonica")
    assert 0 < Schedule.of(result.network, result.policies[0].state).reused < 0.8
    reopened = aerogel.load(tmp_path / "out", lazy=False)
    with policies.on(result.network, result.policies):
        for call in record(result.network.processor, result.network.module, wanted):
            assert torch.equal(output(reopened.module, call), output(result.network.module, call))


def test_inputs_may_be_smoothed_first(tmp_path: Path) -> None:
    """Where the family knows a norm that takes the scale over; targets of the float network are the same before and after."""
    tiny = FAMILIES["unet"]
    built = tiny.build()
    for name, part in built.named_modules():
        if name.endswith("norm3"):
            part.weight.data[0] *= 40  # an outlier among the inputs of the feed-forward layer
    plain = copy.deepcopy(built)
    quantizing: list[dict[str, Any]] = [
        {"brecq": {"scheme": "W8A16_CHANNEL", "steps": 5, "batch": 4, "targets": ["*ff.net.0.proj"]}},
        {"activation_ranges": {"start": "minmax", "steps": 0}},
    ]  # fmt: skip
    error = {}
    for name, first in {"plain": [], "smooth": [{"smoothquant": {}}]}.items():
        steps = {"steps": [*first, *quantizing]}
        result = aerogel.compress(copy.deepcopy(built), steps, samples=calls(), output=tmp_path / name, measures=())
        smoothed = {line["name"] for line in result.journal if line["method"] == "smoothquant"}
        assert bool(smoothed) == bool(first)
        parts = {name.rpartition("transformer_blocks.0.")[2] for name in smoothed}
        assert parts >= ({"ff.net.0.proj", "attn1.to_q", "attn2.to_q"} if first else set())
        reopened = aerogel.load(tmp_path / name, lazy=False)
        error[name] = 0.0
        for call in calls():
            before, answer = output(plain, call), output(result.network.module, call)
            error[name] += float((answer - before).square().mean())
            assert (output(reopened.module, call) - answer).norm() <= 1e-6 * answer.norm()
    assert error["smooth"] < error["plain"]


@pytest.mark.parametrize("recipe", ["tfmq-w4a8", "tfm-w4a8-cache"])
def test_recipes_that_need_the_step_alone_refuse_a_label(recipe: str) -> None:
    tiny = FAMILIES["dit"]
    with pytest.raises(AerogelError, match="also depend on the class label"):
        aerogel.compress(tiny.build(), recipe, samples=tiny.calls(2), overrides=quicker(recipe), measures=())
