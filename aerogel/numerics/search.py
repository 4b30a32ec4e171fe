"""The grid of a weight by least squared error, plain or as the layer's output feels it.

Letters in names: O outputs, I inputs, G groups of a row, n numbers that share a scale.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aerogel.numerics.observers import best_factor, min_max
from aerogel.numerics.quantize import Grid, grid_from_range, to_codes, to_values
from aerogel.numerics.scheme import TensorScheme

Observer = Literal["minmax", "mse"]
"""Searches for a weight's range: it covers every number, or it makes the squared error least."""

COARSE = tuple(factor / 100 for factor in range(108, 30, -8))
"""Shares of the full range that are tried first; also a little more than all of it, since a symmetric grid reaches less far up than
down. None is tried twice, also not by way of `FINE`: which of two equal ones is taken would depend on the last bits of the sums."""
FINE = ((-0.04, 0.04), (-0.02, 0.02), (-0.01, 0.01))
"""What is added to the best of them, and then to the best of those: the error is within 0.5 % of that with all steps of 0.01 (4 bits)."""
ROUGH = tuple(factor / 10 for factor in range(10, 4, -1))
"""Shares that are tried where only the order of several searches counts."""

Shared = Tensor | Grid
"""Outer scale, or whole grid, of several weights."""
_CHUNK = 1 << 17
"""Numbers that are worked on at a time: a cache's worth."""


def observe(
    weight: Tensor, scheme: TensorScheme, observer: Observer, importance: Tensor | None = None, shared: Shared | None = None
) -> Grid:
    """Return the grid of a weight laid out by `quantize.grouped`: (..., n); `importance` weighs squared errors, as in `least_error`.

    `shared` is what the weight has in common with others: an outer scale, for formats that have one, or the grid itself.
    """
    if isinstance(shared, Grid):
        return shared
    outer = shared
    return min_max(weight, scheme, outer) if observer == "minmax" else least_error(weight, scheme, importance=importance, outer=outer)


@torch.no_grad()
def least_error(
    weight: Tensor,
    scheme: TensorScheme,
    moment: Tensor | None = None,
    importance: Tensor | None = None,
    rough: bool = False,
    outer: Tensor | None = None,
) -> Grid:
    """Return the grid with the least squared error for each scale, among ranges that are shrunk by a factor.

    `weight` is laid out by `quantize.grouped`: (..., n). With `moment`, the Hessian of the inputs in each group (G, n, n), the
    error is that of the output, e^T M e, for weights of shape (O, G, n). With `importance`, laid out as the weight or with a first
    dimension of one, it is a weighted sum of squares. `rough` tries few factors. `outer` is that of `observe`.
    """
    low, high = torch.aminmax(weight.float(), dim=-1)
    outer = grid_from_range(low, high, scheme, outer).outer  # block scales of every candidate share it
    if weight.ndim == 1:
        best = _least_error_factor(weight.float(), low, high, scheme, outer, moment, importance, rough)
    else:
        rows = max(1, _CHUNK // weight[0].numel())
        shared = importance is None or len(importance) == 1
        parts = []
        for first in range(0, len(weight), rows):
            here = slice(first, first + rows)
            matters = importance if shared or importance is None else importance[here]
            parts.append(_least_error_factor(weight[here].float(), low[here], high[here], scheme, outer, moment, matters, rough))
        best = torch.cat(parts)
    return grid_from_range(low * best, high * best, scheme, outer)


def _least_error_factor(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    scheme: TensorScheme,
    outer: Tensor | None,
    moment: Tensor | None,
    importance: Tensor | None,
    rough: bool,
) -> Tensor:
    full = grid_from_range(low, high, scheme, outer)
    # In steps of the full range, so that a candidate that shrinks it by a factor is one product away: its zero point is the same.
    unit = weight / full.step[..., None]
    zero = None if full.zero is None else full.zero[..., None].float()
    scaled, error = torch.empty_like(unit), torch.empty_like(unit)
    even = scheme.scale_format == "float" or not scheme.symmetric

    def cost(factor: Tensor) -> Tensor:
        """The error in squares of the full range's steps."""
        step = factor if even else grid_from_range(low * factor, high * factor, scheme, outer).step / full.step
        torch.mul(unit, step.reciprocal()[..., None], out=scaled)
        if zero is not None:
            scaled.add_(zero)
        if scheme.format.kind == "int":
            torch.round(scaled, out=error).clamp_(scheme.format.low, scheme.format.high)
        else:
            error.copy_(to_values(to_codes(scaled, scheme.format), scheme.format))
        error.sub_(scaled)
        if moment is not None:
            return torch.linalg.vecdot(error, (error.transpose(0, 1) @ moment).transpose(0, 1)) * step.square()
        error.square_()
        if importance is not None:
            error.mul_(importance)
        return error.sum(-1) * step.square()

    one = torch.ones_like(low)
    best, least = best_factor(cost, (one * factor for factor in (ROUGH if rough else COARSE)), one, torch.full_like(one, torch.inf))
    for offsets in () if rough else FINE:
        best, least = best_factor(cost, [best + offset for offset in offsets], best, least)
    return best
