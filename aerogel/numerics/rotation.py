"""Orthogonal matrices that spread outliers over all channels: Hadamard of any size that Paley's constructions reach, or random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aerogel.errors import AerogelError

CHUNK_ROWS = 8192
"""Rows rotated at a time, so that the float64 copy of a large embedding stays small."""


def hadamard(n: int) -> Tensor:
    """Return an orthogonal (n, n) float64 matrix whose entries are all +-1/sqrt(n).

    It is Sylvester's power of two times the smallest base that Paley's constructions give: q + 1 for a prime q = 3 mod 4, or 2q + 2 for a
    prime q = 1 mod 4 (Paley 1933), for example 576 = 2^4 * 36. Raises AerogelError for sizes without such a split.
    """
    doublings = (n & -n).bit_length() - 1
    for k in range(doublings, -1, -1):
        base = _base(n >> k)
        if base is not None:
            for _ in range(k):
                base = torch.cat((torch.cat((base, base), 1), torch.cat((base, -base), 1)))
            return base / n**0.5
    raise AerogelError(f"no Hadamard matrix of size {n} is known here; use a random rotation instead")


def randomized_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """Return a Hadamard matrix (float64) with random signs, which no fixed weight pattern can be aligned with (arXiv:2402.04396)."""
    signs = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * hadamard(n)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Return an (n, n) float64 matrix drawn evenly from all orthogonal ones: QR of a Gaussian, signs fixed (arXiv:math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


ROTATIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {"hadamard": randomized_hadamard, "random": random_orthogonal}


def apply_rotation(x: Tensor, rotation: Tensor) -> Tensor:
    """Return x (..., n) times rotation (n, n), computed in float64 and rounded once to x's dtype and device."""
    flat = x.detach().reshape(-1, x.shape[-1])
    rotation = rotation.to(flat.device, torch.float64)
    return torch.cat([(part.double() @ rotation).to(x.dtype) for part in flat.split(CHUNK_ROWS)]).reshape(x.shape)


def _base(m: int) -> Tensor | None:
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m % 4 == 0 and _is_prime(m - 1):
        return _paley_one(m - 1)
    if m % 4 == 0 and m // 2 % 4 == 2 and _is_prime(m // 2 - 1):
        return _paley_two(m // 2 - 1)
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


def _conference(q: int) -> Tensor:
    """The Legendre symbols chi(i - j) bordered by ones: a matrix C with zero diagonal and C C^T = q I."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    index = torch.arange(q)
    core = chi[(index[:, None] - index) % q]
    border = torch.ones(q + 1, q + 1, dtype=torch.float64)
    border[1:, 1:] = core
    border[0, 0] = 0
    return border


def _paley_one(q: int) -> Tensor:
    skew = _conference(q)
    skew[1:, 0] = -1
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(_conference(q), plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
