"""TIAR against its formula, and what it promises: features closer than rounding to nearest, everything else untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import aerogel
from aerogel.engine.progress import Event
from aerogel.errors import AerogelError
from aerogel.layers.linear import QuantLinear
from aerogel.methods.diffusion.tiar import Tiar, features_with, temporal_error
from aerogel.model import time_path
from aerogel.numerics.scheme import Scheme
from tests.tiny import FAMILIES, opened, output

STEPS = tuple(float(step) for step in range(980, -1, -20))


def path_of(name: str = "unet") -> tuple[time_path.TemporalPath, Tensor]:
    network, (call,) = opened(name), FAMILIES[name].calls(1)
    path = time_path.find(network)
    return path, time_path.sinusoids(network, path, call, STEPS)


def literal_error(features: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    total = 0.0
    for name, feature in features.items():
        for step in range(len(feature)):
            total += sum(float((a - b) ** 2) for a, b in zip(feature[step], wanted[name][step], strict=True)) / len(feature)
    return total


def error_of(path: time_path.TemporalPath, sinusoid_TC: Tensor, twins: dict[str, QuantLinear]) -> float:
    weights = {name: twin.dequantized(torch.float32) for name, twin in twins.items()}
    with torch.no_grad():
        return float(temporal_error(features_with(path, sinusoid_TC, weights), path.features(sinusoid_TC)))


def test_the_error_is_the_mean_over_steps_of_squared_distances() -> None:
    path, sinusoid_TC = path_of()
    some = sinusoid_TC[:3]
    weights = {name: linear.weight * 1.01 for name, linear in path.projections.items()}
    with torch.no_grad():
        moved, wanted = features_with(path, some, weights), path.features(some)
        assert float(temporal_error(moved, wanted)) == pytest.approx(literal_error(moved, wanted), rel=1e-4)
        assert temporal_error(features_with(path, some, {}), wanted) == 0


@pytest.mark.parametrize("bits", [4, pytest.param(3, marks=pytest.mark.slow)])
def test_features_come_closer_than_by_rounding_to_nearest(bits: int) -> None:
    path, sinusoid_TC = path_of()
    scheme = Scheme.parse(f"W{bits}A16_CHANNEL_ASYM")
    nearest = error_of(path, sinusoid_TC, Tiar(steps=0).quantize(path, sinusoid_TC, scheme))
    learned = error_of(path, sinusoid_TC, Tiar(steps=600).quantize(path, sinusoid_TC, scheme))
    assert learned < nearest / 3


def test_without_steps_it_rounds_to_nearest() -> None:
    path, sinusoid_TC = path_of()
    twins = Tiar(steps=0).quantize(path, sinusoid_TC, Scheme.parse("W4A16_CHANNEL_ASYM"))
    linears = {**path.embedding_linears, **path.projections}
    assert twins.keys() == linears.keys()
    for name, twin in twins.items():
        error = (twin.dequantized(torch.float32) - linears[name].weight).abs()
        assert (error / twin.grid().scale).quantile(0.98) <= 0.5 + 1e-3


def test_the_path_is_quantized_and_nothing_else_is_touched() -> None:
    network = FAMILIES["unet"].build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calls = FAMILIES["unet"].calls(3)
    result = aerogel.compress(network, {"steps": [{"tiar": {"steps": 20, "first": False}}]}, samples=calls, measures=())
    module = result.network.module
    reached = {name for name, part in module.named_modules() if isinstance(part, QuantLinear)}
    path = time_path.find(result.network)
    assert reached == {*path.projections, "time_embedding.linear_2"}
    after = module.state_dict()
    left = [name for name in before if name.removesuffix(".weight") not in reached]
    assert all(torch.equal(after[name], before[name]) for name in left)
    assert not module.training
    assert all(output(module, call).isfinite().all() for call in calls)


def test_a_path_with_labels_is_refused() -> None:
    with pytest.raises(AerogelError, match="the class label"):
        aerogel.compress(FAMILIES["dit"].build(), {"steps": [{"tiar": {}}]}, samples=FAMILIES["dit"].calls(1), measures=())


def test_a_network_in_bfloat16_is_fitted_in_float32() -> None:
    calls = [call.map(lambda x: x.bfloat16() if x.is_floating_point() else x) for call in FAMILIES["unet"].calls(2)]
    network = FAMILIES["unet"].build().bfloat16()
    result = aerogel.compress(network, {"steps": [{"tiar": {"steps": 5}}]}, samples=calls, measures=())
    answer = output(result.network.module, calls[0])
    assert answer.dtype == torch.bfloat16
    assert all(part.bias is None or part.bias.dtype == torch.bfloat16 for part in network.modules() if isinstance(part, QuantLinear))


def test_a_long_fit_tells_how_far_it_is() -> None:
    told: list[Event] = []
    recipe = {"steps": [{"tiar": {"steps": 200}}]}
    aerogel.compress(FAMILIES["unet"].build(), recipe, samples=FAMILIES["unet"].calls(2), measures=(), tell=told.append)
    shares = [event.share for event in told if event.stage == "compress" and event.what == "tiar"]
    assert shares == sorted(shares)
    assert len(shares) > 90


def test_the_plan_counts_the_path() -> None:
    network = opened("unet")
    plan = aerogel.plan(network.module, {"steps": [{"tiar": {}}]}, samples=FAMILIES["unet"].calls(1))
    path = time_path.find(network)
    assert {line.name for line in plan.touched} == {*path.embedding_linears, *path.projections}
    assert plan.share_reached > 0
    assert not plan.problems
