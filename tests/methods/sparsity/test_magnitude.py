"""Magnitude pruning removes exactly the smallest weights, and later steps keep the zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel.errors import AerogelError
from aerogel.layers.conv import matrix
from aerogel.layers.linear import QuantLinear
from aerogel.methods.sparsity.magnitude import Magnitude, kept_by_share, smallest
from aerogel.model.network import Network
from tests.tiny import FAMILIES, opened

MATRIX = {"options": {"sparsity": 0.02}}  # which moves a network of random weights by less than eight bits do


def targeted(network: Network) -> dict[str, nn.Linear]:
    return {name: part for name, part in network.module.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"}


def weights(network: Network) -> dict[str, Tensor]:
    return {name: linear.weight.detach().clone() for name, linear in targeted(network).items()}


def by_sorting(weight: Tensor, count: int) -> Tensor:
    """The literal method: sort all magnitudes, drop the first `count`."""
    order = weight.abs().flatten().sort(stable=True).indices
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[order[:count]] = False
    return kept.view_as(weight)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 3))
def test_each_layer_loses_its_smallest(percent: int, dtype: torch.dtype, seed: int) -> None:
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[0] = weight[1]  # equal magnitudes
    (kept,) = kept_by_share([weight], percent / 100, "layer")
    assert torch.equal(kept, by_sorting(weight, round(percent / 100 * 210)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_threshold_for_all_layers_is_that_of_their_sorted_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(5, 40, generator=generator) * size).to(dtype) for size in (1.0, 0.1, 3.0)]
    kept = torch.cat(list(kept_by_share(parts, 0.4, "global")))
    assert torch.equal(kept, by_sorting(torch.cat(parts), round(0.4 * 600)))
    assert [int((~part).sum()) for part in kept.split(5)][1] > 150, "the layer of small weights loses most"


def test_the_threshold_and_its_ties() -> None:
    assert smallest([torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0])], 2) == (1.0, 1)
    assert smallest([torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.0])], 4) == (3.0, 1)
    assert smallest([torch.tensor([1e-40, 2e-40])], 1)[1] == 1


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_a_pattern_keeps_the_largest_of_every_few(pattern: str, kept: int, of: int) -> None:
    network = opened("llama")
    before = weights(network)
    Magnitude(pattern=pattern).apply(network, [])
    for name, linear in targeted(network).items():
        for run, was in zip(linear.weight.reshape(-1, of), before[name].reshape(-1, of), strict=True):
            survivors = was.abs().topk(kept).indices
            assert torch.equal(run[survivors], was[survivors])
            assert int(run.count_nonzero()) == kept


def test_a_model_in_memory_and_the_journal_say_the_same() -> None:
    model = FAMILIES["llama"].build()
    head = model.lm_head.weight.clone()
    recipe = {"name": "m", "steps": [{"magnitude": {"sparsity": 0.3, "scope": "global"}}]}
    result = aerogel.compress(model, recipe, measures=())
    layers = targeted(result.network)
    assert [line["name"] for line in result.journal] == list(layers)
    assert {line["method"] for line in result.journal} == {"magnitude"}
    zeros = {name: float((linear.weight == 0).float().mean()) for name, linear in layers.items()}
    for line in result.journal:
        assert line["sparsity"] == pytest.approx(zeros[line["name"]])
        assert line["name"].startswith(line["block"])
        assert 0 < line["error"] < 0.1
    total = sum(linear.weight.numel() for linear in layers.values())
    assert sum(int((linear.weight == 0).sum()) for linear in layers.values()) == round(0.3 * total)
    assert len(set(zeros.values())) > 1
    assert torch.equal(model.lm_head.weight, head)


QUANTIZED: list[dict[str, dict[str, Any]]] = [
    {"gptq": {"scheme": "W4A16_G32"}},
    {"gptq": {"scheme": "W4A16_G32_ASYM", "act_order": "group"}},
    {"rtn": {"scheme": "W4A16_G32_ASYM"}},
    {"rtn": {"scheme": "W8A8"}},
    {"awq": {"scheme": "W4A16_G32"}},
    {"brecq": {"scheme": "W4A16_CHANNEL_ASYM", "targets": ["Linear"], "steps": 8, "batch": 2, "rate": 0.1}},
]


@pytest.mark.parametrize(
    ("step", "pattern"),
    [*((step, "unstructured") for step in QUANTIZED), *((step, "2:4") for step in QUANTIZED if "gptq" in step or "rtn" in step)],
)
def test_zeros_stay_when_the_others_are_quantized(step: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    """From a folder: blocks are put away between the steps."""
    FAMILIES["llama"].build().save_pretrained(tmp_path / "source")
    pruned = opened("llama")
    Magnitude(pattern=pattern).apply(pruned, [])
    recipe = {"name": "both", "steps": [{"magnitude": {"pattern": pattern}}, {"smoothquant": {}}, step]}
    result = aerogel.compress(tmp_path / "source", recipe, samples=FAMILIES["llama"].calls(3), output=tmp_path / "out", measures=())
    opened_again = aerogel.load(tmp_path / "out", lazy=False).module
    for name, linear in targeted(pruned).items():
        layer = opened_again.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        rounded = layer.dequantized(torch.float32)
        assert (rounded[linear.weight == 0] == 0).all(), name
        assert rounded.count_nonzero() > 0.6 * linear.weight.count_nonzero()
    assert sum("sparsity" in line for line in result.journal) == len(targeted(pruned))


def test_zeros_of_the_temporal_path_stay_when_its_rounding_is_learned() -> None:
    recipe = {
        "name": "m",
        "steps": [{"magnitude": {"targets": ["*time_emb*"]}}, {"tiar": {"scheme": "W4A16_CHANNEL_ASYM", "steps": 20, "rate": 1.0}}],
    }
    pruned = opened("unet")
    Magnitude(targets=("*time_emb*",)).apply(pruned, [])
    assert len(pruned.pruned) > 2
    result = aerogel.compress(FAMILIES["unet"].build(), recipe, samples=FAMILIES["unet"].calls(3), measures=())
    for name in pruned.pruned:
        linear, layer = pruned.module.get_submodule(name), result.network.module.get_submodule(name)
        rounded = layer.dequantized(torch.float32) if isinstance(layer, QuantLinear) else layer.weight
        assert (rounded[linear.weight == 0] == 0).all(), name


def test_the_shipped_recipe(tmp_path: Path) -> None:
    calls = FAMILIES["llama"].calls(3)
    aerogel.compress(FAMILIES["llama"].build(), "magnitude-2of4-w4a16", samples=calls, output=tmp_path / "out", measures=())
    network = aerogel.load(tmp_path / "out", lazy=False)
    layers = [part for part in network.module.modules() if isinstance(part, QuantLinear)]
    assert len(layers) == len(targeted(opened("llama")))
    for layer in layers:
        assert int(layer.dequantized(torch.float32).reshape(-1, 4).count_nonzero(-1).max()) == 2


def test_what_is_saved_is_a_plain_dense_model(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "source")
    recipe = {"name": "m", "steps": [{"magnitude": {"pattern": "2:4"}}]}
    aerogel.compress(tmp_path / "source", recipe, output=tmp_path / "out", measures=())
    before, after = load_file(tmp_path / "source/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (theirs.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_convolutions_lose_their_smallest_too() -> None:
    network = opened("unet")
    Magnitude(sparsity=0.5, targets=("Conv2d",)).apply(network, [])
    convs = [part for name, part in network.module.named_modules() if isinstance(part, nn.Conv2d) and name in network.pruned]
    assert convs
    assert all(int((matrix(conv) == 0).sum()) == round(0.5 * conv.weight.numel()) for conv in convs)
    assert not any((linear.weight == 0).any() for linear in targeted(network).values())


def test_a_rotation_after_it_is_refused() -> None:
    recipe = {"name": "m", "steps": [{"magnitude": {}}, {"rotate": {}}]}
    with pytest.raises(AerogelError, match="would fill the zeros that it makes; put rotate before magnitude"):
        aerogel.compress(FAMILIES["llama"].build(), recipe, measures=())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.0}, "option 'sparsity'"),
        ({"sparsity": 1.0}, "option 'sparsity'"),
        ({"sparsity": float("nan")}, "option 'sparsity'"),
        ({"pattern": "4:2"}, "N:M with N below M"),
        ({"pattern": "half"}, "N:M with N below M"),
        ({"pattern": "1:4"}, "1:4 has sparsity 0.75, not 0.5; set sparsity to that"),
        ({"pattern": "2:4", "scope": "global"}, "leave scope: global out"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        Magnitude(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["*.nothing"]}, "reaches no layer"),
        ({"pattern": "7:14"}, r"does not fit 7:14: Linear\(in_features=64.*ignore it"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_changes(options: dict[str, Any], words: str) -> None:
    network = opened("llama")
    before = weights(network)
    with pytest.raises(AerogelError, match=words):
        aerogel.compress(network, {"name": "m", "steps": [{"magnitude": options}]}, measures=())
    assert all(torch.equal(linear.weight, before[name]) for name, linear in targeted(network).items())
