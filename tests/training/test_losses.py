"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.training.losses import cosine_distance, distillation_kl, normalized_mse


def test_normalized_mse_does_not_know_the_unit() -> None:
    target = torch.randn(4, 5)
    assert float(normalized_mse(1.1 * target, target)) == pytest.approx(0.01, rel=1e-4)
    assert float(normalized_mse(1.1e3 * target, 1e3 * target)) == pytest.approx(0.01, rel=1e-4)
    assert float(normalized_mse(torch.zeros(3), torch.zeros(3))) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_of_two_coins(temperature: float) -> None:
    teacher, student = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    p, q = 1 / (1 + math.exp(-2 / temperature)), 1 / (1 + math.exp(1 / temperature))
    expected = temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert float(distillation_kl(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_kl(teacher.repeat(7, 1), teacher.repeat(7, 1), temperature)) == pytest.approx(0, abs=1e-7)


def test_cosine_distance_is_blind_to_length() -> None:
    target = torch.randn(3, 4, 8)
    assert float(cosine_distance(5 * target, target)) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(-target, target)) == pytest.approx(2)
    assert float(cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))) == pytest.approx(1)
