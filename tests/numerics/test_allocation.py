"""Rules of allocation against their literal formulas, and the budget that all of them meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.numerics import allocation
from aerogel.numerics.allocation import Shares, by_energy, by_threshold, erk, lamp, over_norm, require_met

SHAPES = {"wide": (32, 8), "small": (4, 4), "conv": (8, 4, 3, 3), "tall": (3, 40)}


def weights(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * scale
        for (name, shape), scale in zip(shapes.items(), (1.0, 0.3, 2.0, 0.7), strict=False)
    }


def sizes(of: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: weight.numel() for name, weight in of.items()}


RULES: dict[str, Callable[[Mapping[str, Tensor], float], Shares]] = {
    "erk": lambda of, s: erk({name: tuple(weight.shape) for name, weight in of.items()}, s),
    "erk half": lambda of, s: erk({name: tuple(weight.shape) for name, weight in of.items()}, s, 0.5),
    "global": by_threshold,
    "l1": lambda of, s: by_threshold(of, s, over_norm(1)),
    "l2": lambda of, s: by_threshold(of, s, over_norm(2)),
    "lamp": lambda of, s: by_threshold(of, s, lamp),
    "energy": by_energy,
}


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=6)
@given(st.integers(1, 95), st.integers(0, 3))
def test_the_budget_is_met(rule: str, percent: int, seed: int) -> None:
    shapes = {name: (*shape[:-1], 10 * shape[-1]) for name, shape in SHAPES.items()}  # counts are whole: 1e-3 of them is one weight
    of = weights(seed, shapes)
    shares = RULES[rule](of, percent / 100)
    assert shares.keys() == of.keys()
    assert abs(sum(share * of[name].numel() for name, share in shares.items()) / sum(sizes(of).values()) - percent / 100) < 1e-3
    assert all(0 <= share < 1 for share in shares.values())


def test_erk_is_the_literal_formula() -> None:
    shapes = {"a": (30, 20), "b": (10, 40), "conv": (16, 8, 3, 3)}
    raw = {"a": 50 / 600, "b": 50 / 400, "conv": 30 / 1152}
    shares = erk(shapes, 0.9)
    size = {"a": 600, "b": 400, "conv": 1152}
    factor = 0.1 * 2152 / sum(raw[name] * size[name] for name in raw)
    assert shares == pytest.approx({name: 1 - factor * raw[name] for name in raw})


def test_erk_leaves_a_layer_dense_that_would_keep_more_than_it_has() -> None:
    shares = erk({"tiny": (2, 2), "large": (64, 64), "larger": (64, 128)}, 0.5)
    assert shares["tiny"] == 0
    assert 64 * 64 * shares["large"] + 64 * 128 * shares["larger"] == pytest.approx(0.5 * (4 + 64 * 64 + 64 * 128))
    kept = {"large": (1 - shares["large"]) / (128 / 64**2), "larger": (1 - shares["larger"]) / (192 / (64 * 128))}
    assert kept["large"] == pytest.approx(kept["larger"])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=8), st.integers(1, 99))
def test_erk_ends_for_extreme_shapes(shapes: list[tuple[int, int]], percent: int) -> None:
    named = {str(number): shape for number, shape in enumerate(shapes)}
    shares = erk(named, percent / 100)
    require_met(shares, {name: math.prod(shape) for name, shape in named.items()}, percent / 100)


@pytest.mark.parametrize(("shapes", "power"), [(dict.fromkeys("abc", (12, 20)), 1.0), (SHAPES, 0.0)])
def test_erk_is_uniform_for_equal_shapes_and_for_power_zero(shapes: Mapping[str, tuple[int, ...]], power: float) -> None:
    assert erk(shapes, 0.7, power) == pytest.approx(dict.fromkeys(shapes, 0.7))


def test_one_threshold_is_that_of_the_sorted_weights() -> None:
    of = weights()
    total = sum(sizes(of).values())
    threshold = torch.cat([weight.abs().flatten() for weight in of.values()]).sort().values[round(0.4 * total) - 1]
    expected = {name: float((weight.abs() <= threshold).float().mean()) for name, weight in of.items()}
    assert by_threshold(of, 0.4) == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2])
def test_a_normalised_rule_ignores_the_scale_of_a_layer_and_global_magnitude_does_not(order: int) -> None:
    of = weights()
    scaled = {**of, "conv": of["conv"] * 8}
    assert by_threshold(scaled, 0.5, over_norm(order)) == by_threshold(of, 0.5, over_norm(order))
    assert by_threshold(scaled, 0.5) != by_threshold(of, 0.5)
    divided = {name: weight / weight.flatten().norm(order) for name, weight in of.items()}
    assert by_threshold(of, 0.5, over_norm(order)) == pytest.approx(by_threshold(divided, 0.5))


def test_a_cap_is_kept_and_the_others_lose_what_it_saves() -> None:
    of = weights()
    free, capped = by_threshold(of, 0.5), by_threshold(of, 0.5, cap=0.7)
    assert free["small"] > 0.9
    assert max(capped.values()) <= 0.7
    assert capped["small"] == 11 / 16
    require_met(capped, sizes(of), 0.5)
    rest = {name: weight for name, weight in of.items() if capped[name] < int(0.7 * weight.numel()) / weight.numel()}
    left = sum(capped[name] * weight.numel() for name, weight in rest.items()) / sum(sizes(rest).values())
    assert by_threshold(rest, left) == pytest.approx({name: capped[name] for name in rest})


def test_the_last_weight_of_a_layer_stays() -> None:
    shares = by_threshold({"loud": torch.full((10, 10), 5.0), "quiet": torch.full((10,), 0.1)}, 0.5)
    assert shares["quiet"] == 0.9
    assert shares["loud"] == 46 / 100


@pytest.mark.parametrize("rule", [by_threshold, by_energy])
def test_a_cap_below_the_sparsity_is_an_error(rule: Callable[..., Shares]) -> None:
    with pytest.raises(AerogelError, match=r"0\.8 cannot be met with at most 0\.5 in a layer"):
        rule(weights(), 0.8, cap=0.5)


def test_lamp_is_the_literal_formula() -> None:
    weight = torch.tensor([[3.0, -1.0], [2.0, 1.0]])
    # Sorted squares 1, 1, 4, 9: over 15, 14, 13, 9; of the two of size 1 the first counts as the smaller.
    assert torch.equal(lamp(weight), torch.tensor([[1.0, 1 / 15], [4 / 13, 1 / 14]]))


def test_lamp_leaves_the_largest_of_each_layer() -> None:
    of = weights()
    for name, share in by_threshold(of, 0.97, lamp).items():
        assert share < 1, name
        assert lamp(of[name]).flatten()[of[name].abs().argmax()] == 1


def test_layers_lose_the_same_energy() -> None:
    of = weights(shapes={"a": (100, 100), "b": (200, 100), "c": (50, 300)})
    of["b"] = of["b"] ** 3  # few large weights hold most of its energy
    shares = by_energy(of, 0.5)
    lost = []
    for name, weight in of.items():
        squares = weight.square().flatten().sort().values
        lost.append(float(squares[: round(shares[name] * weight.numel())].sum() / squares.sum()))
    assert max(lost) - min(lost) < 1e-3
    assert shares["b"] > shares["a"] + 0.1


def test_bytes_are_turned_into_a_share() -> None:
    size, bytes_each = {"a": 80, "b": 160}, {"a": 2, "b": 4}
    sparsity = allocation.from_bytes(size, bytes_each, 430)
    assert 240 / 8 + (1 - sparsity) * (160 + 640) == pytest.approx(430)
    with pytest.raises(AerogelError, match="take 800 as they are; give less"):
        allocation.from_bytes(size, bytes_each, 800)
    with pytest.raises(AerogelError, match="masks of the layers that are meant take 30 alone; give more"):
        allocation.from_bytes(size, bytes_each, 30)


def test_a_budget_that_is_missed_is_noticed() -> None:
    with pytest.raises(AssertionError, match="allocated"):
        require_met({"a": 0.4}, {"a": 100}, 0.5)
    with pytest.raises(AssertionError, match="below 1"):
        require_met({"a": 1.0, "b": 0.0}, {"a": 100, "b": 100}, 0.5)
