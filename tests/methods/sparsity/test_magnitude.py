"""Magnitude pruning removes exactly the smallest weights, and later steps keep the zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import aerogel
from aerogel.errors import AerogelError
from aerogel.layers.conv import matrix
from aerogel.layers.linear import QuantLinear
from aerogel.methods.sparsity.magnitude import Magnitude
from aerogel.model.network import Network
from aerogel.model.walk import blocks_of
from tests.tiny import FAMILIES, opened

MATRIX = {"options": {"sparsity": 0.02}}  # which moves a network of random weights by less than eight bits do


def targeted(network: Network) -> dict[str, nn.Linear]:
    return {name: part for name, part in network.module.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"}


def weights(network: Network) -> dict[str, Tensor]:
    return {name: linear.weight.detach().clone() for name, linear in targeted(network).items()}


def pruned_by(method: Magnitude, name: str = "llama") -> Network:
    network = opened(name)
    for block in blocks_of(network):
        method.compress(block)
    return network


@pytest.mark.parametrize("compared", ["layer", "row"])
def test_each_layer_loses_its_smallest(compared: Any) -> None:
    before = weights(opened("llama"))
    for name, linear in targeted(pruned_by(Magnitude(0.3, compared=compared))).items():
        groups = zip(linear.weight, before[name], strict=True) if compared == "row" else [(linear.weight, before[name])]
        for group, was in groups:
            count = int(was.numel() * 0.3) if compared == "row" else round(was.numel() * 0.3)
            wanted = was.flatten().clone()
            wanted[was.abs().flatten().argsort(stable=True)[:count]] = 0
            assert torch.equal(group.flatten(), wanted)


def test_masks_nest() -> None:
    less, more = targeted(pruned_by(Magnitude(0.2))), targeted(pruned_by(Magnitude(0.6)))
    for name, linear in less.items():
        assert not more[name].weight[linear.weight == 0].any()


def test_shares_of_an_allocation_are_taken_layer_by_layer() -> None:
    network = opened("llama")
    names = list(targeted(network))
    network.sparsities = {name: place / len(names) for place, name in enumerate(names[1:])}
    notes = []
    for block in blocks_of(network):
        Magnitude(None).compress(block)
        notes += block.notes
    for name, linear in targeted(network).items():
        assert int((linear.weight == 0).sum()) == round(linear.weight.numel() * network.sparsities.get(name, 0))
    assert [note["name"] for note in notes if "no share" in note.get("fallback", "")] == names[:1]


def test_a_null_sparsity_needs_an_allocation_before() -> None:
    with pytest.raises(AerogelError, match="magnitude has sparsity: null and comes after no step that gives layers their shares"):
        aerogel.compress(FAMILIES["llama"].build(), {"name": "m", "steps": [{"magnitude": {"sparsity": None}}]}, measures=())


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_a_pattern_keeps_the_largest_of_every_few(pattern: str, kept: int, of: int) -> None:
    before = weights(opened("llama"))
    for name, linear in targeted(pruned_by(Magnitude(pattern=pattern))).items():
        for run, was in zip(linear.weight.reshape(-1, of), before[name].reshape(-1, of), strict=True):
            survivors = was.abs().topk(kept).indices
            assert torch.equal(run[survivors], was[survivors])
            assert int(run.count_nonzero()) == kept


@pytest.mark.parametrize("compared", ["layer", "row"])
def test_whole_blocks_go_by_the_sum_of_their_magnitudes(compared: Any) -> None:
    before = weights(opened("llama"))
    for name, linear in targeted(pruned_by(Magnitude(0.75, "16x32", compared=compared))).items():
        rows, columns = linear.out_features // 16, linear.in_features // 32
        sums = torch.tensor(
            [[float(before[name][16 * r : 16 * r + 16, 32 * c : 32 * c + 32].abs().sum()) for c in range(columns)] for r in range(rows)]
        )
        gone = set[tuple[int, int]]()
        if compared == "layer":
            gone |= {divmod(int(place), columns) for place in sums.flatten().argsort()[: round(0.75 * sums.numel())]}
        else:
            gone |= {(r, int(c)) for r in range(rows) for c in sums[r].argsort()[: int(0.75 * columns)]}
        for r in range(rows):
            for c in range(columns):
                part = (slice(16 * r, 16 * r + 16), slice(32 * c, 32 * c + 32))
                wanted = torch.zeros(16, 32) if (r, c) in gone else before[name][part]
                assert torch.equal(linear.weight[part], wanted), (name, r, c)


def test_a_model_in_memory_and_the_journal_say_the_same() -> None:
    model = FAMILIES["llama"].build()
    head = model.lm_head.weight.clone()
    recipe = {"name": "m", "steps": [{"magnitude": {"sparsity": 0.3}}]}
    result = aerogel.compress(model, recipe, measures=())
    layers = targeted(result.network)
    assert [line["name"] for line in result.journal] == list(layers)
    assert {line["method"] for line in result.journal} == {"magnitude"}
    zeros = {name: float((linear.weight == 0).float().mean()) for name, linear in layers.items()}
    for line in result.journal:
        assert line["sparsity"] == pytest.approx(zeros[line["name"]])
        assert line["name"].startswith(line["block"])
        assert 0 < line["error"] < 0.1
    for name, linear in layers.items():
        assert zeros[name] == pytest.approx(0.3, abs=1 / linear.weight.numel())
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
    pruned = pruned_by(Magnitude(pattern=pattern))
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
    pruned = pruned_by(Magnitude(targets=("*time_emb*",)), "unet")
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
    network = pruned_by(Magnitude(sparsity=0.5, targets=("Conv2d",)), "unet")
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
        ({"pattern": "0x32"}, "or blocks"),
        ({"pattern": "32x"}, "or blocks"),
        ({"pattern": "1:4"}, "1:4 has sparsity 0.75, not 0.5; set sparsity to that"),
        ({"pattern": "2:4", "sparsity": None}, "2:4 has sparsity 0.5, not null; set sparsity to that"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        Magnitude(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["*.nothing"]}, "reaches no layer"),
        ({"pattern": "7:14"}, r"does not fit 7:14: its weight of \d+ x 64 has no inputs in runs of 14; ignore it"),
        ({"pattern": "48x32"}, r"does not fit 48x32: its weight of \d+ x 64 has no whole blocks of 48 outputs and 32 inputs; ignore it"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_anything_changes(options: dict[str, Any], words: str) -> None:
    network = opened("llama")
    before = weights(network)
    with pytest.raises(AerogelError, match=words):
        aerogel.compress(network, {"name": "m", "steps": [{"magnitude": options}]}, measures=())
    assert all(torch.equal(linear.weight, before[name]) for name, linear in targeted(network).items())
