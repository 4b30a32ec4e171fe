"""AdaRound (arXiv:2004.10568): whether each weight is rounded up or down is learned; between the two a rectified sigmoid decides.

Everything is relative to a grid that stays as it is. O outputs, I inputs; `alpha_OI` is what is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.numerics.quantize import Grid, expand
from aerogel.numerics.scheme import TensorScheme

_STRETCH, _SHIFT = 1.2, 0.1
"""The sigmoid reaches from -0.1 to 1.1 before it is cut off, so that it arrives at 0 and 1."""


def share_up(alpha: Tensor) -> Tensor:
    """Return how far each weight is rounded up, 0 to 1: the rectified sigmoid."""
    return (_STRETCH * alpha.sigmoid() - _SHIFT).clamp(0, 1)


def first_alpha(weight_OI: Tensor, grid: Grid, scheme: TensorScheme, kept_OI: Tensor | None = None) -> Tensor:
    """Return the alpha_OI with which the soft weight is the weight itself, save for what the grid cuts off.

    Pruned weights, zeros where `kept_OI` is False, get minus infinity, which no gradient moves: they stay zero.
    """
    scaled, _ = _scaled(weight_OI, grid, scheme)
    alpha_OI = torch.logit((scaled - scaled.floor() + _SHIFT) / _STRETCH)
    return alpha_OI if kept_OI is None else alpha_OI.masked_fill(~kept_OI, -torch.inf)


def soft_weight(weight_OI: Tensor, alpha_OI: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """Return the weight_OI between its two neighbours on the grid; differentiable in alpha."""
    return _value(weight_OI, share_up(alpha_OI), grid, scheme)


def hard_weight(weight_OI: Tensor, alpha_OI: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """Return the weight_OI rounded up where alpha is not negative, else down."""
    return _value(weight_OI, (alpha_OI >= 0).float(), grid, scheme)


def hard_codes(weight_OI: Tensor, alpha_OI: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """Return the codes_OI of `hard_weight`: the floor, or one more where alpha is not negative."""
    scaled, zero = _scaled(weight_OI, grid, scheme)
    codes = scaled.floor() + (alpha_OI >= 0) + zero
    return codes.clamp(scheme.format.low, scheme.format.high).to(scheme.format.storage)


def undecided(alpha: Tensor, beta: float) -> Tensor:
    """Return sum 1 - |2 share - 1|^beta: nothing where every weight has decided; high beta leaves the middle alone."""
    return (1 - (2 * share_up(alpha) - 1).abs().pow(beta)).sum()


def beta_at(step: int, steps: int, warmup: float, start: float = 20.0, end: float = 2.0) -> float | None:
    """Return the beta of a step, counted from 0: none in the warm-up's share of the steps, then falling in a line."""
    first = warmup * steps
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / (steps - first))


def _value(weight_OI: Tensor, share_OI: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    scaled, zero = _scaled(weight_OI, grid, scheme)
    codes = (scaled.floor() + share_OI + zero).clamp(scheme.format.low, scheme.format.high)
    return (codes - zero) * expand(grid.step, weight_OI.shape[-1], scheme.granularity, weight_OI.shape[-2])


def _scaled(weight_OI: Tensor, grid: Grid, scheme: TensorScheme) -> tuple[Tensor, Tensor | int]:
    rows, columns = weight_OI.shape[-2:]
    zero = 0 if grid.zero is None else expand(grid.zero, columns, scheme.granularity, rows).float()
    return weight_OI.float() / expand(grid.step, columns, scheme.granularity, rows), zero
