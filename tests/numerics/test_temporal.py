"""Temporal features against the exact ones: literal loops, by hand where they are small or silent."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.numerics.temporal import drift, totals


def test_it_is_what_a_literal_loop_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(7, 5, generator=generator)
    given = exact + torch.randn(7, 5, generator=generator)
    found = drift(exact, given)
    rows, others = exact.double().tolist(), given.double().tolist()
    wrong = 0
    for step in range(7):
        distances = [sum((f - g) ** 2 for f, g in zip(row, others[step], strict=True)) for row in rows]
        size = sum(f * f for f in rows[step])
        inner = sum(f * g for f, g in zip(rows[step], others[step], strict=True))
        cosine = inner / math.sqrt(size) / math.sqrt(sum(g * g for g in others[step]))
        assert float(found.error_T[step]) == pytest.approx(distances[step])
        assert float(found.size_T[step]) == pytest.approx(size)
        assert float(found.relative[step]) == pytest.approx(distances[step] / size)
        assert float(found.cosine_T[step]) == pytest.approx(cosine)
        assert bool(found.mismatch_T[step]) == (distances.index(min(distances)) != step)
        wrong += bool(found.mismatch_T[step])
    assert 0 < wrong < 7, "the case has both"


def test_a_step_that_is_taken_for_its_neighbour() -> None:
    exact = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = drift(exact, torch.tensor([[0.9, 0.0], [0.8, 0.3], [0.0, 2.0]]))
    assert found.mismatch_T.tolist() == [False, True, True]
    assert found.error_T.tolist() == pytest.approx([0.01, 0.64 + 0.49, 5.0])
    assert found.cosine_T.tolist() == pytest.approx([1.0, 0.3 / math.sqrt(0.73), 0.0])


def test_equal_features_are_of_their_step_though_another_has_the_same() -> None:
    exact = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    found = drift(exact, exact)
    assert found.mismatch_T.tolist() == [False] * 3
    assert found.relative.tolist() == [0.0] * 3
    assert found.cosine_T.tolist() == pytest.approx([1.0] * 3)


def test_small_distances_of_large_features_are_not_lost() -> None:
    exact = 1000 + torch.tensor([[0.0], [0.001]])
    assert drift(exact, exact.flip(0)).mismatch_T.tolist() == [True, True]


def test_silence() -> None:
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    assert [float(value) for value in (drift(zeros, zeros).relative, drift(zeros, zeros).cosine_T)] == [0, 1]
    assert [float(value) for value in (drift(zeros, ones).relative, drift(zeros, ones).cosine_T)] == [math.inf, 0]
    assert [float(value) for value in (drift(ones, zeros).relative, drift(ones, zeros).cosine_T)] == [1, 0]


def test_every_block_and_step_counts_once_in_the_totals() -> None:
    exact = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    near, far = drift(exact, torch.tensor([[0.9, 0.0], [0.8, 0.3], [0.0, 2.0]])), drift(2 * exact, 2 * exact)
    found = totals([near, far])
    assert found.error == pytest.approx((0.01 + 1.13 + 5.0) / (3 + 12))
    assert found.cosine == pytest.approx((1 + 0.3 / math.sqrt(0.73) + 0 + 3) / 6)
    assert (found.least_cosine, found.mismatch) == (pytest.approx(0), pytest.approx(2 / 6))
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1)
    assert (totals([drift(zeros, zeros)]).error, totals([drift(zeros, ones)]).error) == (0.0, math.inf)
