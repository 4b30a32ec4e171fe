"""Channel permutation: the assignment is the best there is, and a pattern never keeps less in the order that is found."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from aerogel.numerics.channel_permutation import assignment, channel_order, kept_score


@pytest.mark.parametrize("seed", range(5))
def test_the_assignment_is_that_of_trying_all(seed: int) -> None:
    cost = np.random.default_rng(seed).integers(-9, 9, (6, 6)).astype(float)
    found = assignment(cost)
    assert sorted(found) == list(range(6))
    best = min(sum(cost[row, column] for row, column in enumerate(columns)) for columns in permutations(range(6)))
    assert cost[np.arange(6), found].sum() == best


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8)])
def test_a_pattern_keeps_more_in_the_order_that_is_found(kept: int, of: int) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(12, 32, generator=generator) * torch.logspace(-1, 1, 32)  # large channels beside each other
    order = channel_order(score, kept, of)
    assert torch.equal(order.sort().values, torch.arange(32))
    assert kept_score(score[:, order], kept, of) > 1.05 * kept_score(score, kept, of)


def test_channels_stay_where_nothing_is_to_be_gained() -> None:
    assert torch.equal(channel_order(torch.ones(3, 16), 2, 4), torch.arange(16))
