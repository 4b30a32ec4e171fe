"""The least-error search finds the best of its candidates, for the plain error and for the error that outputs feel."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from aerogel.numerics.quantize import Grid, dequantize, fake_quantize, grid_from_range, grouped, quantize, weight_grid
from aerogel.numerics.scheme import Scheme
from aerogel.numerics.search import COARSE, FINE, ROUGH, least_error, observe


def weight(rows: int = 9, columns: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.98))


def error(weight_OI: Tensor, grid: Grid, name: str) -> Tensor:
    """Squared error of each row."""
    scheme = Scheme.parse(name).weights
    return (dequantize(quantize(weight_OI, grid, scheme), grid, scheme) - weight_OI).square().sum(1)


@pytest.mark.parametrize("name", ["W3A16_CHANNEL", "W4A16_CHANNEL_ASYM", "W2A16_CHANNEL", "FP8_DYNAMIC"])
def test_the_search_finds_what_a_finer_one_over_everything_finds(name: str) -> None:
    scheme, weight_OI = Scheme.parse(name).weights, weight()
    found = error(weight_OI, least_error(grouped(weight_OI, scheme.granularity), scheme), name)
    low, high = weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True)
    costs = {f: error(weight_OI, grid_from_range(low * f / 100, high * f / 100, scheme), name) for f in range(108, 31, -1)}
    assert (found <= torch.stack([costs[round(100 * factor)] for factor in COARSE]).amin(0) * (1 + 1e-5)).all()
    assert float(found.sum()) <= 1.02 * float(torch.stack(list(costs.values())).amin(0).sum())


@pytest.mark.parametrize("name", ["W3A16_G32", "W4A16_G32_ASYM", "NVFP4A16", "MXFP4A16", "FP8_STATIC"])
def test_every_granularity_is_at_least_as_good_as_covering_all(name: str) -> None:
    scheme, weight_OI = Scheme.parse(name).weights, weight()
    searched, covering = (observe(grouped(weight_OI, scheme.granularity), scheme, rule) for rule in ("mse", "minmax"))
    assert searched.scale.shape == covering.scale.shape
    assert torch.equal(covering.scale, weight_grid(weight_OI, scheme).scale)
    errors = [float((fake_quantize(weight_OI, grid, scheme) - weight_OI).square().sum()) for grid in (searched, covering)]
    assert errors[0] <= errors[1] * (1 + 1e-5)


def test_with_a_moment_the_output_counts() -> None:
    scheme, weight_OI = Scheme.parse("W3A16_G16").weights, weight(40, 48)
    x_TI = torch.randn(500, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1.5, 1.5, 48)
    blocks = torch.stack([x_TI[:, g : g + 16].T @ x_TI[:, g : g + 16] for g in (0, 16, 32)])
    felt = least_error(grouped(weight_OI, scheme.granularity), scheme, blocks)
    low, high = torch.aminmax(grouped(weight_OI, scheme.granularity), dim=-1)

    def cost(grid: Grid) -> Tensor:
        """Squared error of what each group adds to each output, from the stored inputs: cost_OG."""
        error_OI = fake_quantize(weight_OI, grid, scheme) - weight_OI
        return torch.stack([(x_TI[:, g : g + 16] @ error_OI[:, g : g + 16].T).square().sum(0) for g in (0, 16, 32)], 1)

    best = cost(felt)
    for factor in (*COARSE, 1.0):
        assert (best <= cost(grid_from_range(low * factor, high * factor, scheme)) * (1 + 1e-4)).all()
    assert float(best.sum()) < 0.97 * float(cost(least_error(grouped(weight_OI, scheme.granularity), scheme)).sum())


@pytest.mark.parametrize("name", ["W3A16_G16", "W3A16_CHANNEL", "FP8_STATIC", "FP8_BLOCK"])
def test_importance_weighs_squares(name: str) -> None:
    """A diagonal moment and an importance say the same; and however weights are laid out, what matters more is hit better."""
    scheme, weight_OI = Scheme.parse(name).weights, weight(40, 48)
    importance_I = torch.logspace(-3, 3, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(3))]
    by_row = name.startswith("W3")
    laid_out = grouped(importance_I.expand(1 if by_row else 40, -1), scheme.granularity)
    found = least_error(grouped(weight_OI, scheme.granularity), scheme, importance=laid_out)
    if by_row:
        same = least_error(grouped(weight_OI, scheme.granularity), scheme, moment=torch.diag_embed(laid_out[0]))
        assert torch.equal(found.scale, same.scale)
    plain = least_error(grouped(weight_OI, scheme.granularity), scheme)
    cost = [float(((fake_quantize(weight_OI, grid, scheme) - weight_OI).square() * importance_I).sum()) for grid in (found, plain)]
    assert cost[0] < cost[1] if by_row else cost[0] <= cost[1]


def test_a_weight_of_zeros_gets_a_finite_grid() -> None:
    scheme = Scheme.parse("W4A16_G16").weights
    grid = least_error(torch.zeros(3, 2, 16), scheme)
    assert torch.isfinite(grid.scale).all()
    assert (grid.scale > 0).all()


def test_no_factor_is_tried_twice() -> None:
    for best, *moves in product(COARSE, *((0.0, *offsets) for offsets in FINE)):
        tried = list(COARSE)
        for offsets, move in zip(FINE, moves, strict=True):
            tried += [best + offset for offset in offsets]
            best += move
        assert len({round(1000 * factor) for factor in tried}) == len(tried)


def test_a_rough_search_finds_the_best_of_its_few_factors() -> None:
    scheme, weight_OI = Scheme.parse("W3A16_G16").weights, weight(40, 48)
    laid_out = grouped(weight_OI, scheme.granularity)
    low, high = torch.aminmax(laid_out, dim=-1)

    def cost(grid: Grid) -> Tensor:
        return grouped(fake_quantize(weight_OI, grid, scheme) - weight_OI, scheme.granularity).square().sum(-1)

    found = cost(least_error(laid_out, scheme, rough=True))
    best = torch.stack([cost(grid_from_range(low * factor, high * factor, scheme)) for factor in ROUGH]).amin(0)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-6)
