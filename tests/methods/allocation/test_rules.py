"""Allocation steps hand each layer the share that its rule gives, change no weight, and pruning steps take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aerogel
from aerogel import catalog
from aerogel.engine.planning import plan
from aerogel.errors import AerogelError
from aerogel.methods.allocation.policy import AllocationMethod
from aerogel.model.network import Network
from aerogel.numerics import allocation
from tests.tiny import FAMILIES, opened

RULES = [name for name in catalog.names("methods") if issubclass(catalog.find("methods", name), AllocationMethod)]
BY_WEIGHTS = [name for name in RULES if "calls" not in catalog.find("methods", name)().requires]


def layers(network: Network, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> dict[str, Any]:
    return {name: part for name, part in network.module.named_modules() if isinstance(part, kinds) and name != "lm_head"}


@pytest.mark.parametrize("rule", BY_WEIGHTS)
def test_a_pruning_step_takes_the_shares(rule: str, tmp_path: Path) -> None:
    """From a folder: the steps see the weights apart."""
    FAMILIES["llama"].build().save_pretrained(tmp_path / "source")
    recipe = {"name": "a", "steps": [{rule: {"sparsity": 0.6}}, {"magnitude": {"sparsity": None}}]}
    result = aerogel.compress(tmp_path / "source", recipe, output=tmp_path / "out", measures=())
    network = aerogel.load(tmp_path / "out", lazy=False)
    given = {line["name"]: line["allocated"] for line in result.journal if line["method"] == rule}
    found = layers(network)
    assert given.keys() == found.keys()
    for name, layer in found.items():
        assert float((layer.weight == 0).float().mean()) == pytest.approx(given[name], abs=1 / layer.weight.numel())
    total = sum(layer.weight.numel() for layer in found.values())
    assert sum(int((layer.weight == 0).sum()) for layer in found.values()) == pytest.approx(0.6 * total, abs=1e-3 * total)
    assert len(set(given.values())) > 2


@pytest.mark.parametrize("rule", BY_WEIGHTS)
def test_no_weight_changes_and_convolutions_count(rule: str) -> None:
    network = opened("unet")
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    catalog.find("methods", rule)(sparsity=0.3, targets=("Linear", "Conv2d")).apply(network, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.module.state_dict().items())
    found = layers(network, (nn.Linear, nn.Conv2d))
    assert network.sparsities.keys() <= found.keys()
    assert any(isinstance(found[name], nn.Conv2d) for name in network.sparsities)
    allocation.require_met(network.sparsities, {name: found[name].weight.numel() for name in network.sparsities}, 0.3)


def test_the_rules_are_those_of_the_formulas() -> None:
    shares: dict[str, dict[str, float]] = {}
    for rule in BY_WEIGHTS:
        network = opened("llama")
        catalog.find("methods", rule)(sparsity=0.7).apply(network, [])
        shares[rule] = dict(network.sparsities)
    of = {name: layer.weight for name, layer in layers(opened("llama")).items()}
    assert shares == {
        "erk": pytest.approx(allocation.erk({name: tuple(weight.shape) for name, weight in of.items()}, 0.7)),
        "global_magnitude": allocation.by_threshold(of, 0.7),
        "layer_norm_magnitude": allocation.by_threshold(of, 0.7, allocation.over_norm(2)),
        "lamp": allocation.by_threshold(of, 0.7, allocation.lamp),
        "energy_table": allocation.by_energy(of, 0.7),
    }


def test_bytes_are_an_alternative_to_a_share() -> None:
    network = opened("llama")
    total = sum(layer.weight.numel() for layer in layers(network).values())
    budget = int(total / 8 + 0.25 * 4 * total)
    catalog.find("methods", "erk")(budget_bytes=budget).apply(network, [])
    allocation.require_met(network.sparsities, {name: layer.weight.numel() for name, layer in layers(network).items()}, 0.75)


def test_the_plan_names_layers_that_stay_dense() -> None:
    options = {"sparsity": 0.3, "power": 2.0}
    planned = plan(opened("llama"), {"name": "a", "steps": [{"erk": options}]}, flops_a_second=lambda: 1e9)
    assert any(line.startswith("erk: model.layers.0.self_attn.k_proj and 3 other layers would keep") for line in planned.remarks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["*.nothing"]}, "reaches no layer"),
        ({"budget_bytes": 10}, "erk: budget_bytes is 10, and the masks .* give more"),
        ({"budget_bytes": 10**9}, "erk: budget_bytes is 1,000,000,000, .* as they are; give less"),
        ({"budget_bytes": 10**5, "sparsity": 0.5}, "sparsity and budget_bytes both say how much is pruned; give one of them"),
        ({"sparsity": 1.0}, "option 'sparsity'"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AerogelError, match=words):
        aerogel.compress(FAMILIES["llama"].build(), {"name": "a", "steps": [{"erk": options}]}, measures=())


def test_a_cap_below_the_sparsity_is_refused() -> None:
    steps = [{"lamp": {"sparsity": 0.8, "max_sparsity": 0.7}}]
    with pytest.raises(AerogelError, match=r"lamp: max_sparsity 0\.7 is below the sparsity 0\.8 of all layers together; raise it"):
        aerogel.compress(FAMILIES["llama"].build(), {"name": "a", "steps": steps}, measures=())
