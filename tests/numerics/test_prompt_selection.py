"""Scores of blocks against loops, and the least set of groups that has a share of the sum."""

from __future__ import annotations

import itertools

import pytest
import torch

from aerogel.numerics.prompt_selection import block_scores, group_sums, max_pool, mean_pool, smallest_mass


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_block_scores_equal_a_loop(reduce: str) -> None:
    """Two blocks of two sub-blocks of three positions; the second row lacks the first block, and outer positions belong to none."""
    score_BK = torch.rand(2, 14, generator=torch.Generator().manual_seed(0))
    place_BK = torch.arange(14).expand(2, -1) - 1
    place_BK = torch.where((place_BK < 0) | (place_BK >= 12), -1, place_BK).clone()
    place_BK[1, :7] = -1
    found_BG = block_scores(score_BK, place_BK, sub_block=3, block=6, blocks=2, reduce=reduce)  # type: ignore[arg-type]
    for row, block in ((0, 0), (0, 1), (1, 1)):
        start = 1 + 6 * block
        units = [float(score_BK[row, start + 3 * unit : start + 3 * unit + 3].mean()) for unit in range(2)]
        assert float(found_BG[row, block]) == pytest.approx(max(units) if reduce == "max" else sum(units) / 2)
    assert found_BG[1, 0] == -torch.inf


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_constant_added_to_all_scores_changes_no_order(reduce: str) -> None:
    score_BK = torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    place_BK = torch.arange(64)[None]
    plain, more = (block_scores(score_BK + add, place_BK, 4, 8, 8, reduce) for add in (0, 5.0))  # type: ignore[arg-type]
    assert torch.equal(plain.argsort(dim=1, stable=True), more.argsort(dim=1, stable=True))


def test_group_sums_count_positions_of_a_group_only() -> None:
    sum_BG, count_BG = group_sums(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, -1, 2, 0]]), 3)
    assert sum_BG.tolist() == [[9, 0, 4]]
    assert count_BG.tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_smallest_mass_equals_an_exhaustive_search(share: float) -> None:
    score_BG = torch.rand(20, 6, generator=torch.Generator().manual_seed(1))
    there_BG = torch.rand(20, 6, generator=torch.Generator().manual_seed(2)) < 0.8
    there_BG[:, 0] = True
    found_BG = smallest_mass(score_BG, there_BG, share)
    for row in range(20):
        groups = [group for group in range(6) if there_BG[row, group]]
        mass = {group: float(score_BG[row, group]) for group in groups}
        enough = [
            chosen
            for size in range(1, len(groups) + 1)
            for chosen in itertools.combinations(groups, size)
            if sum(mass[group] for group in chosen) >= share * sum(mass.values()) - 1e-9
        ]
        fewest = min(map(len, enough))
        heaviest = max((chosen for chosen in enough if len(chosen) == fewest), key=lambda chosen: sum(mass[group] for group in chosen))
        assert set(found_BG[row].nonzero()[:, 0].tolist()) == set(heaviest)


def test_of_equal_groups_the_earlier_ones_are_chosen() -> None:
    score_BG = torch.ones(1, 4)
    assert smallest_mass(score_BG, torch.ones(1, 4, dtype=torch.bool), 0.5).tolist() == [[True, True, False, False]]


def test_pools_equal_loops() -> None:
    score_BK = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    for place in range(9):
        window = score_BK[:, max(0, place - 2) : place + 3]
        torch.testing.assert_close(mean_pool(score_BK, 5)[:, place], window.sum(1) / 5)
        assert torch.equal(max_pool(score_BK, 5)[:, place], window.amax(1))
