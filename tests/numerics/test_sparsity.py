"""The share of zeros, and patterns that keep the largest of each few."""

from __future__ import annotations

import torch

from aerogel.numerics.sparsity import kept_by_pattern, zero_share


def test_the_share_of_zeros() -> None:
    assert zero_share(torch.tensor([[0.0, 1.0], [-0.0, 2.0]])) == 0.5
    assert zero_share(torch.ones(3)) == 0.0


def test_a_pattern_keeps_the_largest_of_each_run() -> None:
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 0.0]])
    assert kept_by_pattern(score, 2, 4).tolist() == [[False, True, True, False, True, True, False, False]]
    assert kept_by_pattern(score, 4, 8).tolist() == [[False, True, False, False, True, True, True, False]]
