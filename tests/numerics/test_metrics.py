"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aerogel.numerics.metrics import cosine, kl_divergence, relative_error, sqnr_db, top1_agreement


def test_kl_divergence_of_two_coins() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    coin = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    logits_p, logits_q = p.log().expand(2, 3, 2), torch.stack((q, q, p)).log().expand(2, 3, 2) + 5
    assert kl_divergence(logits_p, logits_q) == pytest.approx(coin * 2 / 3, rel=1e-5)
    assert kl_divergence(logits_q, logits_q) == 0


def test_top1_agreement_counts_tokens() -> None:
    p = torch.eye(4)[None]
    q = p.clone()
    q[0, 0] = torch.tensor([0.0, 2.0, 0.0, 0.0])
    assert top1_agreement(p, q) == 0.75


def test_errors_of_a_tenth() -> None:
    x = torch.randn(50)
    assert relative_error(x, 0.9 * x) == pytest.approx(0.1, rel=1e-4)
    assert sqnr_db(x, 0.9 * x) == pytest.approx(20, rel=1e-4)
    assert cosine(x, 0.9 * x) == pytest.approx(1)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(2**-0.5)


def test_silence() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, ones) == math.inf
    assert sqnr_db(ones, ones) == math.inf
