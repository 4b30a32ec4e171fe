"""Rotations are orthogonal, Hadamard ones flat, and sizes without one are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import AerogelError
from aerogel.numerics.rotation import ROTATIONS, apply_rotation, hadamard, random_orthogonal, randomized_hadamard

SIZES = (1, 2, 4, 12, 20, 28, 36, 40, 60, 76, 108, 128, 140, 148, 576, 960, 1536)


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_orthogonal_and_flat(n: int) -> None:
    h = hadamard(n)
    assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, n**-0.5), rtol=1e-12)


def test_powers_of_two_are_sylvester() -> None:
    expected = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(8)] for i in range(8)])
    assert torch.allclose(hadamard(8), expected.double() / 8**0.5)


@given(st.integers(1, 400))
def test_every_size_is_orthogonal_or_refused(n: int) -> None:
    try:
        h = hadamard(n)
    except AerogelError:
        return
    assert n <= 2 or n % 4 == 0  # Hadamard: no other size has one
    assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 6, 52])
def test_sizes_without_a_construction(n: int) -> None:
    with pytest.raises(AerogelError, match=f"size {n}"):
        hadamard(n)


@pytest.mark.parametrize("kind", list(ROTATIONS))
def test_random_rotations_follow_their_generator(kind: str) -> None:
    draw = ROTATIONS[kind]
    first, again, other = (draw(60, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.allclose(first.T @ first, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)


def test_random_orthogonal_is_not_biased_by_the_sign_of_qr() -> None:
    """LAPACK's own convention makes diagonals lean to one sign; an even draw does not."""
    generator = torch.Generator().manual_seed(0)
    diagonals = torch.stack([random_orthogonal(3, generator).diagonal() for _ in range(400)])
    assert bool((diagonals.mean(0).abs() < 0.1).all())  # the standard error is 0.03


def test_an_outlier_is_spread() -> None:
    spike = torch.zeros(1, 576)
    spike[0, 7] = 24.0
    rotated = apply_rotation(spike, randomized_hadamard(576, torch.Generator().manual_seed(0)))
    assert torch.allclose(rotated.abs(), torch.ones(1, 576))


def test_apply_keeps_shape_and_dtype_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 12).bfloat16()
    r = hadamard(12)
    expected = (x.double() @ r).bfloat16()
    monkeypatch.setattr("aerogel.numerics.rotation.CHUNK_ROWS", 3)
    assert torch.equal(apply_rotation(x, r), expected)
