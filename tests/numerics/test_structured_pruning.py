"""The repaired weight is that of least squares, and the order of optimal brain surgeon that of its closed form."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from aerogel.numerics.structured_pruning import by_unit, largest, obs_order, repaired, wanda_scores


def made(inputs: int = 24, outputs: int = 10, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x_TI


def moment(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


def error(weight_OI: Tensor, x_TI: Tensor, kept_K: Tensor, weight_OK: Tensor) -> float:
    return float((x_TI @ weight_OI.T - x_TI[:, kept_K] @ weight_OK.T).square().sum())


def test_the_repaired_weight_is_that_of_numpy() -> None:
    weight_OI, x_TI = made()
    kept_K = torch.tensor([0, 2, 3, 7, 11, 12, 13, 20])
    found = repaired(weight_OI, moment(x_TI), kept_K, 0.0)
    theirs, *_ = numpy.linalg.lstsq(x_TI[:, kept_K].numpy(), (x_TI @ weight_OI.T).numpy(), rcond=None)
    assert not found.failed
    assert numpy.allclose(found.weight_OK.numpy(), theirs.T, rtol=1e-6, atol=1e-8)
    assert error(weight_OI, x_TI, kept_K, found.weight_OK) < error(weight_OI, x_TI, kept_K, weight_OI[:, kept_K])


@pytest.mark.parametrize("percdamp", [0.01, 1.0])
def test_a_ridge_never_makes_it_worse(percdamp: float) -> None:
    for seed in range(5):
        weight_OI, x_TI = made(seed=seed)
        kept_K = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:15].sort().values
        found = repaired(weight_OI, moment(x_TI), kept_K, percdamp)
        assert error(weight_OI, x_TI, kept_K, found.weight_OK) <= error(weight_OI, x_TI, kept_K, weight_OI[:, kept_K])


def test_what_loses_nothing_is_not_changed() -> None:
    """All inputs kept, an input that was always zero, and one that nobody reads."""
    weight_OI, x_TI = made()
    assert torch.equal(repaired(weight_OI, moment(x_TI), torch.arange(24), 0.01).weight_OK, weight_OI)
    x_TI[:, 5] = 0
    weight_OI[:, 9] = 0
    kept_K = torch.tensor([place for place in range(24) if place not in (5, 9)])
    assert torch.equal(repaired(weight_OI, moment(x_TI), kept_K, 0.01).weight_OK, weight_OI[:, kept_K])


def test_a_moment_that_cannot_be_factorised_changes_nothing() -> None:
    weight_OI, x_TI = made()
    kept_K = torch.arange(12)
    for broken in (-moment(x_TI), torch.zeros(24, 24)):
        found = repaired(weight_OI, broken, kept_K, 0.01)
        assert found.failed
        assert torch.equal(found.weight_OK, weight_OI[:, kept_K])
    assert obs_order(weight_OI, torch.zeros(24, 24), torch.arange(24), 24, 4, 0.01) is None


@pytest.mark.parametrize("width", [1, 3])
def test_each_unit_that_leaves_costs_least_after_the_others_are_adjusted(width: int) -> None:
    """By trying every unit at every step with the least-squares weight itself."""
    weight_OI, x_TI = made()
    unit_I = torch.arange(24) // width
    left = list(range(24 // width))
    order = obs_order(weight_OI, moment(x_TI), unit_I, len(left), 5, 1e-9)
    assert order is not None
    for unit in order.tolist():
        errors = {}
        for candidate in left:
            kept_K = torch.isin(unit_I, torch.tensor([one for one in left if one != candidate])).nonzero()[:, 0]
            errors[candidate] = error(weight_OI, x_TI, kept_K, repaired(weight_OI, moment(x_TI), kept_K, 1e-9).weight_OK)
        assert unit == min(errors, key=errors.__getitem__)
        left.remove(unit)


def test_of_twins_one_stays() -> None:
    """Two inputs that are always the same count for one: one of them costs nothing, and the other everything once that is gone."""
    weight_OI, x_TI = made()
    x_TI[:, 4] = x_TI[:, 17]
    weight_OI[:, [4, 17]] *= 10
    order = obs_order(weight_OI, moment(x_TI), torch.arange(24), 24, 8, 1e-6)
    assert order is not None
    assert order[0] in (4, 17)
    assert not {4, 17} <= set(order.tolist())


def test_scores_of_units() -> None:
    weight_OI, x_TI = made()
    unit_I = torch.arange(24) % 4
    scores_U = wanda_scores(weight_OI, x_TI.square().mean(0), unit_I, 4)
    wanda_OI = weight_OI.abs() * x_TI.square().mean(0).sqrt()
    assert torch.allclose(scores_U, torch.stack([wanda_OI[:, unit_I == unit].norm() for unit in range(4)]))
    assert by_unit(torch.ones(24), unit_I, 4).tolist() == [6.0] * 4
    assert largest(torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 3, 4]
