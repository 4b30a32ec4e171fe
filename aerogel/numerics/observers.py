"""Observers of the range that a grid should cover: extremes, least error, percentiles, and running ranges for static activations.

Observers read numbers already laid out by `quantize.grouped`: (grid shape, n), n numbers to a scale. A short last group is padded with
zeros, which change neither a range nor an error; a percentile counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.numerics.quantize import Grid, grid_from_range, grouped, to_codes, to_values
from aerogel.numerics.scheme import TensorScheme

CHUNK_VALUES = 1 << 16
"""Numbers that a search holds at a time: its temporaries stay in the cache of one core, which makes it about twice as fast."""


@torch.no_grad()
def min_max(x: Tensor, scheme: TensorScheme, outer: Tensor | None = None) -> Grid:
    """Return the grid that covers every number; `outer` is that of `grid_from_range`."""
    low, high = torch.aminmax(x, dim=-1)
    return grid_from_range(low, high, scheme, outer)


@torch.no_grad()
def percentile(x: Tensor, scheme: TensorScheme, share: float = 0.999) -> Grid:
    """Return the grid that covers the numbers between the (1 - share) and the share quantile (nearest rank); 0.5 < share <= 1."""
    if not 0.5 < share <= 1:
        raise AerogelError(f"percentile: share is {share}, expected more than 0.5 and at most 1")
    x, count = x.float(), x.shape[-1]
    rank = math.ceil(share * count)
    return grid_from_range(x.kthvalue(count + 1 - rank, dim=-1).values, x.kthvalue(rank, dim=-1).values, scheme)


@torch.no_grad()
def mse_search(x: Tensor, scheme: TensorScheme, p: float = 2.4, shrink: float = 0.8, steps: int = 100) -> Grid:
    """Return the grid that makes sum |error|^p least for each scale, among ranges shrunk by i / steps up to `shrink`.

    The search of GPTQ's reference code (arXiv:2210.17323); p above 2 keeps outliers from being given up too easily.
    """
    low, high = torch.aminmax(x.float(), dim=-1)
    outer = grid_from_range(low, high, scheme).outer  # block scales of every candidate share it
    factors = [1 - i / steps for i in range(round(shrink * steps) + 1)]
    rows, lows, highs = x.flatten(0, -2) if x.ndim > 1 else x[None], low.flatten(), high.flatten()
    best = torch.empty_like(lows)
    for part in torch.arange(len(rows), device=x.device).split(max(1, CHUNK_VALUES // rows.shape[1])):
        cost = partial(_power_error, rows[part].float(), lows[part], highs[part], scheme, outer, p)
        start = torch.ones_like(lows[part])
        best[part], _ = best_factor(cost, (start * factor for factor in factors), start, torch.full_like(start, torch.inf))
    factor = best.view_as(low)
    return grid_from_range(low * factor, high * factor, scheme, outer)


def best_factor(cost: Callable[[Tensor], Tensor], factors: Iterable[Tensor], best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each scale the factor of its range that costs least, and that cost; `best` and `least` are what to improve on."""
    for factor in factors:
        error = cost(factor)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, factor, best)
    return best, least


def _power_error(rows: Tensor, low: Tensor, high: Tensor, scheme: TensorScheme, outer: Tensor | None, p: float, factor: Tensor) -> Tensor:
    """Return sum |error|^p of each row on the grid of its range times `factor`."""
    grid = grid_from_range(low * factor, high * factor, scheme, outer)
    step, zero = grid.step[:, None], 0 if grid.zero is None else grid.zero[:, None]
    values = (to_values(to_codes(rows / step + zero, scheme.format), scheme.format) - zero) * step
    return values.sub_(rows).abs_().log_().mul_(p).exp_().sum(-1)  # |error|^p at half the cost of pow


class RunningMinMax:
    """The extremes of all activations that were shown; for static ranges."""

    def __init__(self, scheme: TensorScheme) -> None:
        self.scheme = scheme
        self._range: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one activation; an empty one (an expert without tokens) changes nothing; raises AerogelError when it is not finite."""
        if x.numel() == 0:
            return
        low, high = torch.aminmax(grouped(x.detach(), self.scheme.granularity).float(), dim=-1)
        if not bool(torch.isfinite(high - low).all()):
            raise AerogelError(
                "an activation holds NaN or infinity: its range cannot be measured; check the weights and the calibration data"
            )
        self._range = (low, high) if self._range is None else self._merge(*self._range, low, high)

    def _merge(self, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(low, new_low), torch.maximum(high, new_high)

    def grid(self) -> Grid:
        """Return the grid of the range so far; raises AerogelError when nothing was shown."""
        if self._range is None:
            raise AerogelError("no activation reached this observer: calibrate with more samples or leave the layer out with `ignore`")
        return grid_from_range(*self._range, self.scheme)


class Searched:
    """Numbers drawn at random from activations, and the range of least 2.4-norm error on them; one range for the whole tensor.

    The draw is torch's global one. At random, because a fixed stride would meet the same few channels again and again.
    """

    def __init__(self, scheme: TensorScheme, share: int) -> None:
        self.scheme = scheme
        self.share = share
        """Numbers to draw from each activation; a smaller one is kept whole."""
        self.drawn: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Draw from one activation."""
        flat = x.detach().flatten()
        some = flat[torch.randint(len(flat), (self.share,))] if len(flat) > self.share else flat
        self.drawn.append(some.float())

    def grid(self) -> Grid:
        """Return the grid of least error, among ranges shrunk to 1.00, 0.99, ... 0.21."""
        return mse_search(torch.cat(self.drawn), self.scheme, p=2.4, shrink=0.79)


class MovingAverage(RunningMinMax):
    """The exponential moving average of each activation's extremes (arXiv:1712.05877), less led by one outlier than the extremes."""

    def __init__(self, scheme: TensorScheme, rate: float = 0.01) -> None:
        super().__init__(scheme)
        self.rate = rate

    def _merge(self, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor) -> tuple[Tensor, Tensor]:
        return low.lerp(new_low, self.rate), high.lerp(new_high, self.rate)
