"""Thresholds are learned: the error of the blocks reaches every one of them, and the budget is met exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aerogel
from aerogel.engine.opening import open_model
from aerogel.layers.conv import matrix
from aerogel.methods.allocation.fcpts import Fcpts, Thresholds, block_error
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.allocation import corrected, erk, require_met, soft_share
from aerogel.numerics.sparsity import kept_by_count
from tests.methods.reconstruction.pruned import images, tiny_cnn
from tests.tiny import FAMILIES, opened

MATRIX: dict[str, Any] = {"options": {"steps": 2}}


def test_the_derivative_of_a_share_is_that_of_finite_differences() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threshold, width = torch.tensor(0.6, dtype=torch.float64, requires_grad=True), torch.tensor(0.05, dtype=torch.float64)
    (found,) = torch.autograd.grad(soft_share(weight, threshold, width), threshold)
    step = 1e-5
    expected = (soft_share(weight, threshold + step, width) - soft_share(weight, threshold - step, width)) / (2 * step)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(found) > 0.1


@pytest.mark.parametrize("name", ["llama", "unet", "cnn"])
def test_the_error_of_the_blocks_reaches_every_threshold(name: str) -> None:
    """The sparsity has no part in it."""
    network, calls = (open_model(tiny_cnn()), images(1)) if name == "cnn" else (opened(name), FAMILIES[name].calls(1))
    targets = Fcpts(targets=("Linear", "Conv2d")).targeted(network)
    thresholds = Thresholds(targets.layers, dict.fromkeys(targets.layers, 0.5))
    with torch.enable_grad():
        error = block_error(network, [*network.blocks(), ""], thresholds.weights(), calls[0])
        gradients = torch.autograd.grad(error, list(thresholds.logs.values()))
    assert len(gradients) == len(targets.layers) > 5
    assert all(float(gradient.abs()) > 1e-7 for gradient in gradients)
    assert all(parameter.grad is None for parameter in network.module.parameters())


def test_thresholds_start_where_erk_has_them() -> None:
    network = opened("llama")
    targets = Fcpts().targeted(network)
    start = erk({name: tuple(layer.weight.shape) for name, layer in targets.layers.items()}, 0.6)
    thresholds = Thresholds(targets.layers, start)
    assert thresholds.shares() == pytest.approx(start, abs=2e-3)
    thresholds.width = 1e-4
    assert float(thresholds.sparsity().detach()) == pytest.approx(0.6, abs=2e-3)


def pruned_error(network: Network, calls: list[Call], shares: dict[str, float]) -> float:
    """The error of all blocks when each layer loses its smallest weights."""
    weights: dict[str, Tensor] = {}
    for name, share in shares.items():
        layer: Any = network.module.get_submodule(name)
        kept_OI = kept_by_count(matrix(layer).abs(), round(share * layer.weight.numel()))
        weights[f"{name}.weight"] = layer.weight * kept_OI.view_as(layer.weight)
    with torch.no_grad():
        return sum(float(block_error(network, list(network.blocks()), weights, call)) for call in calls)


def test_what_is_learned_is_better_than_where_it_started() -> None:
    """At the same sparsity, with masks that are not soft."""
    network, calls = opened("llama"), FAMILIES["llama"].calls(2)
    with torch.no_grad():  # few of its weights matter
        for layer in network.blocks().values():
            part: Any = layer.get_submodule("mlp.up_proj")
            part.weight.mul_(torch.rand(part.weight.shape, generator=torch.Generator().manual_seed(1)) ** 6 * 4)
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    torch.manual_seed(0)
    Fcpts(sparsity=0.5, steps=40, rate=0.05).apply(network, calls)
    shares, sizes = dict(network.sparsities), {name: network.module.get_submodule(name).weight.numel() for name in network.sparsities}
    require_met(shares, sizes, 0.5)
    assert sum(share * sizes[name] for name, share in shares.items()) == pytest.approx(0.5 * sum(sizes.values()), rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.module.state_dict().items())
    start = erk({name: tuple(network.module.get_submodule(name).weight.shape) for name in shares}, 0.5)  # type: ignore[arg-type]
    assert pruned_error(network, calls, shares) < 0.95 * pruned_error(network, calls, start)
    assert all(share > 0.55 for name, share in shares.items() if name.endswith("up_proj"))


def test_a_pruning_step_takes_what_was_learned() -> None:
    steps = [
        {"fcpts": {"sparsity": 0.4, "steps": 2, "targets": ["Linear", "Conv2d"]}},
        {"magnitude": {"sparsity": None, "targets": ["Linear", "Conv2d"]}},
    ]
    result = aerogel.compress(tiny_cnn(), {"name": "f", "steps": steps}, samples=images(2), measures=())
    found = [part for part in result.network.module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    total = sum(part.weight.numel() for part in found)
    assert sum(int((part.weight == 0).sum()) for part in found) == pytest.approx(0.4 * total, abs=len(found))


def test_shares_are_moved_to_the_budget() -> None:
    sizes = {"a": 100, "b": 300, "c": 50}
    shares = corrected({"a": 0.2, "b": 0.6, "c": 0.0}, sizes, 0.7)
    require_met(shares, sizes, 0.7)
    assert shares["c"] == 0
    assert 0 < shares["a"] < shares["b"] < 1
