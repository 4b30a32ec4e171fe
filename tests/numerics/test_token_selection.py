"""Choice of tokens against slow formulas written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from aerogel.numerics.token_selection import best, density_peaks, farthest_first, means


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12), st.integers(0, 12), st.integers(0, 2**12 - 1))
def test_best_is_a_stable_sort(scores: list[float], count: int, bits: int) -> None:
    candidates = [bool(bits >> number & 1) for number in range(len(scores))]
    expected = sorted((number for number in range(len(scores)) if candidates[number]), key=lambda number: (-scores[number], number))[:count]
    kept_BN = best(torch.tensor([scores]), torch.tensor([candidates]), torch.tensor([count]))
    assert kept_BN[0].nonzero()[:, 0].tolist() == sorted(expected)
    moved_BN = best(torch.tensor([scores]) + 7, torch.tensor([candidates]), torch.tensor([count]))
    assert torch.equal(kept_BN, moved_BN)


@pytest.mark.parametrize("seed", range(5))
def test_farthest_first_is_greedy_at_each_step(seed: int) -> None:
    x_NC = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))

    def away(one: int, other: int) -> float:
        return 1 - float(cosine_similarity(x_NC[one], x_NC[other], dim=0))

    chosen = [max(range(12), key=lambda one: min(away(one, other) for other in range(12) if other != one))]
    while len(chosen) < 5:
        rest = [number for number in range(12) if number not in chosen]
        chosen.append(max(rest, key=lambda one: min(away(one, other) for other in chosen)))
    assert farthest_first(x_NC, 5).tolist() == sorted(chosen)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert sorted(order[farthest_first(x_NC[order], 5)].tolist()) == sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_farthest_first_lies_wider_apart_than_chance(seed: int) -> None:
    x_NC = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))

    def closest(numbers: list[int]) -> float:
        return min(1 - float(cosine_similarity(x_NC[one], x_NC[other], dim=0)) for one, other in itertools.combinations(numbers, 2))

    random = [torch.randperm(64, generator=torch.Generator().manual_seed(draw))[:8].tolist() for draw in range(20)]
    assert closest(farthest_first(x_NC, 8).tolist()) > max(map(closest, random))


def test_farthest_first_keeps_one_of_each_kind() -> None:
    kinds_KC = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x_NC = kinds_KC.repeat(6, 1)
    assert sorted((farthest_first(x_NC, 4) % 4).tolist()) == [0, 1, 2, 3]
    assert farthest_first(x_NC, 99).tolist() == list(range(24))


def test_density_peaks_find_planted_groups() -> None:
    random = torch.Generator().manual_seed(0)
    group_N = torch.arange(3).repeat(7)
    x_NC = 10 * torch.eye(3)[group_N] + 0.1 * torch.randn(21, 3, generator=random)
    found = density_peaks(x_NC, 3, 4)
    assert sorted(group_N[found.centre_G].tolist()) == [0, 1, 2]
    assert torch.equal(group_N[found.centre_G][found.group_N], group_N)
    mean_GC = means(x_NC, found.group_N, 3)
    for group, centre in enumerate(found.centre_G.tolist()):
        torch.testing.assert_close(mean_GC[group], x_NC[group_N == group_N[centre]].mean(0))


def test_density_peaks_follow_the_formula() -> None:
    x_NC = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    distance = [[float((one - other).norm()) / 2 for other in x_NC] for one in x_NC]
    density = [float(torch.tensor(sorted(row)[:3]).square().mean().neg().exp()) for row in distance]
    to_denser = [
        min((distance[one][other] for other in range(9) if density[other] > density[one]), default=max(map(max, distance)))
        for one in range(9)
    ]
    order = sorted(range(9), key=lambda one: -density[one] * to_denser[one])
    found = density_peaks(x_NC, 4, 3)
    assert found.centre_G.tolist() == order[:4]
    for token in set(range(9)) - set(order[:4]):
        assert int(found.group_N[token]) == min(range(4), key=lambda group: distance[token][order[group]])
