"""AdaRound against its formulas, number by number, and what its schedule and regulariser promise."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.numerics import adaround
from aerogel.numerics.observers import min_max, mse_search
from aerogel.numerics.quantize import Grid, dequantize, grouped
from aerogel.numerics.scheme import Scheme, TensorScheme

SCHEMES = ["W4A16_CHANNEL_ASYM", "W3A16_CHANNEL", "W8A16_CHANNEL_ASYM", "W4A16_G16_ASYM"]


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))


def between_two_codes(grid: Grid, scheme: TensorScheme) -> torch.Tensor:
    """Where both neighbours of a weight are on the grid."""
    spread = [part if part.shape[-1] == 1 else part.repeat_interleave(16, dim=-1) for part in (grid.step, grid.zero) if part is not None]
    floor = (weight() / spread[0]).floor() + (spread[1] if len(spread) > 1 else 0)
    return (floor >= scheme.format.low) & (floor + 1 <= scheme.format.high)


@pytest.mark.parametrize("name", SCHEMES)
def test_at_the_start_the_soft_weight_is_the_weight(name: str) -> None:
    scheme = Scheme.parse(name).weights
    grid = min_max(grouped(weight(), scheme.granularity), scheme)
    alpha = adaround.first_alpha(weight(), grid, scheme)
    soft = adaround.soft_weight(weight(), alpha, grid, scheme)
    inside = between_two_codes(grid, scheme)
    torch.testing.assert_close(soft[inside], weight()[inside], rtol=0, atol=1e-5)
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_hard_codes_are_the_floor_or_one_more(name: str, seed: int) -> None:
    scheme = Scheme.parse(name).weights
    grid = mse_search(grouped(weight(seed), scheme.granularity), scheme)
    alpha = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed + 1))
    codes = adaround.hard_codes(weight(seed), alpha, grid, scheme)
    for row in range(6):
        for column in range(32):
            group = column // 16 if "G16" in name else 0
            step, zero = float(grid.step[row, group]), 0 if grid.zero is None else int(grid.zero[row, group])
            floor = math.floor(float(weight(seed)[row, column] / grid.step[row, group]))
            wanted = min(max(floor + (alpha[row, column] >= 0) + zero, scheme.format.low), scheme.format.high)
            assert codes[row, column] == wanted
            value = adaround.hard_weight(weight(seed), alpha, grid, scheme)[row, column]
            assert float(value) == pytest.approx((int(wanted) - zero) * step, abs=1e-5)
    torch.testing.assert_close(dequantize(codes, grid, scheme), adaround.hard_weight(weight(seed), alpha, grid, scheme))


def test_the_sigmoid_is_cut_off_at_nothing_and_one() -> None:
    alpha = torch.tensor([-10.0, -3.0, 0.0, 1.5, 10.0])
    wanted = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in alpha.tolist()]
    assert adaround.share_up(alpha).tolist() == pytest.approx(wanted)


def test_deciding_costs_nothing_and_the_middle_most() -> None:
    assert adaround.undecided(torch.tensor([-20.0, 20.0]), 2.0) == 0
    assert adaround.undecided(torch.tensor([0.0]), 2.0) == 1
    half = torch.tensor([0.5])
    share = 1.2 / (1 + math.exp(-0.5)) - 0.1
    assert float(adaround.undecided(half, 5.0)) == pytest.approx(1 - abs(2 * share - 1) ** 5)


def test_beta_falls_in_a_line_after_the_warm_up() -> None:
    betas = [adaround.beta_at(step, 100, 0.2) for step in range(100)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20
    assert betas[60] == pytest.approx(11)
    differences = {round(a - b, 9) for a, b in pairwise(betas[20:])}  # type: ignore[operator]
    assert len(differences) == 1
    assert betas[-1] == pytest.approx(2 + 18 / 80)


def test_gradients_reach_alpha_only_where_the_grid_does() -> None:
    scheme = Scheme.parse("W3A16_CHANNEL").weights
    grid = min_max(grouped(weight(), scheme.granularity), scheme)
    small = grid._replace(scale=grid.scale * 0.3)
    alpha = adaround.first_alpha(weight(), small, scheme).requires_grad_(True)
    adaround.soft_weight(weight(), alpha, small, scheme).sum().backward()
    inside = between_two_codes(small, scheme)
    beyond = (weight() / small.step > scheme.format.high + 1) | (weight() / small.step < scheme.format.low - 1)
    assert alpha.grad is not None
    assert (alpha.grad[beyond] == 0).all()
    assert (alpha.grad[inside] > 0).all()
    assert beyond.any()
    assert inside.any()


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_of_a_pruned_weight_stay_zero_whatever_is_learned(name: str) -> None:
    scheme = Scheme.parse(name).weights
    pruned = weight() * (torch.arange(32) % 4 < 2)
    grid = min_max(grouped(pruned, scheme.granularity), scheme)
    alpha = torch.nn.Parameter(adaround.first_alpha(pruned, grid, scheme, pruned != 0))
    optimizer = torch.optim.Adam([alpha], lr=1.0)
    for _ in range(5):  # towards larger weights
        optimizer.zero_grad()
        soft = adaround.soft_weight(pruned, alpha, grid, scheme)
        (adaround.undecided(alpha, 4.0) - 100 * soft.sum()).backward()
        optimizer.step()
    assert not alpha.isnan().any()
    rounded = dequantize(adaround.hard_codes(pruned, alpha.detach(), grid, scheme), grid, scheme)
    assert (rounded[pruned == 0] == 0).all()
    assert (soft[pruned == 0] == 0).all()
    assert (rounded[pruned != 0] >= pruned[pruned != 0].amin()).all()
    assert rounded.count_nonzero() > 0
