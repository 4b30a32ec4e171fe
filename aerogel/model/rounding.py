"""From a float layer and a grid to its quantized twin; what methods that end in rounding share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from aerogel.layers.conv import Layer, matrix, quantized
from aerogel.layers.linear import QuantLinear, stored_grid
from aerogel.model.statistics import InputStatistics, bfloat16_products
from aerogel.numerics.observers import mse_search
from aerogel.numerics.quantize import Grid, grid_from_range, grouped, quantize
from aerogel.numerics.scheme import Scheme

_PANEL = 1024
"""Columns of a Hessian whose products with a weight are made at once."""

InputRange = Literal["absmax", "average"]
"""Estimators of the range of static inputs: the extremes of all calls, or their mean over the calls."""


def round_to_nearest(layer: Layer, scheme: Scheme, grid: Grid, dtype: torch.dtype, input_grid: Grid | None = None) -> QuantLinear:
    """Return the quantized twin of `layer` on this grid, whose scales are stored in `dtype`."""
    grid = stored_grid(grid, dtype)
    return quantized(layer, scheme, quantize(matrix(layer), grid, scheme.weights), grid, None, input_grid, dtype)


def rounding_grid(layer: Layer, scheme: Scheme, dtype: torch.dtype | None) -> Grid:
    """Return the grid between whose points learned rounding decides, as stored in `dtype` (the layer's own when None).

    It has the least error in the 2.4-norm, among ranges shrunk to 1.00, 0.99, ... 0.21.
    """
    grid = mse_search(grouped(matrix(layer), scheme.weights.granularity), scheme.weights, p=2.4, shrink=0.79)
    return stored_grid(grid, dtype or layer.weight.dtype)


def static_inputs(scheme: Scheme, statistics: InputStatistics | None, rule: InputRange, dtype: torch.dtype) -> Grid | None:
    """Return the grid of a linear's static inputs, or None when its inputs are float or measured at run time.

    A linear that no token reached gets the grid of an all-zero input: whatever comes later saturates.
    """
    if scheme.inputs is None or scheme.inputs.dynamic:
        return None
    low, high = torch.tensor(statistics.extremes if statistics and statistics.extremes else [(-1.0, 1.0)]).unbind(1)
    low, high = (low.min(), high.max()) if rule == "absmax" else (low.mean(), high.mean())
    return stored_grid(grid_from_range(low, high, scheme.inputs), dtype)


def has_static_inputs(scheme: Scheme) -> bool:
    """Return True where the scheme's inputs are quantized with a range that calibration must find."""
    return scheme.inputs is not None and not scheme.inputs.dynamic


@torch.no_grad()
def output_error(error_OI: Tensor, weight_OI: Tensor, moment_II: Tensor | None) -> float:
    """Relative squared error of a linear's output, tr(E M E^T) / tr(W M W^T); of its weight when no moment is known."""
    return relative_error(output_energy(error_OI, moment_II), weight_OI, moment_II)


@torch.no_grad()
def relative_error(loss: float, weight_OI: Tensor, moment_II: Tensor | None) -> float:
    """Squared error of a linear's output, tr(E M E^T), as a share of tr(W M W^T); of its weight when no moment is known."""
    size = output_energy(weight_OI, moment_II, coarse=weight_OI.dtype == torch.bfloat16)
    return loss / size if size > 0 else 0.0


@torch.no_grad()
def output_energy(weight_OI: Tensor, moment_II: Tensor | None, coarse: bool = False) -> float:
    """Return tr(W M W^T), from one half of M; the squares of W when no moment is known.

    `coarse` rounds factors to bfloat16 where that is faster: about 0.1 % off, since what counts in the sum is of one sign.
    """
    weight_OI = weight_OI.float()
    if moment_II is None:
        return float(weight_OI.square().sum())
    energy = weight_OI.new_zeros(())
    with bfloat16_products() if coarse else nullcontext():
        for start in range(0, len(moment_II), _PANEL):
            panel, behind = slice(start, start + _PANEL), slice(start + _PANEL, None)
            felt_OP = torch.addmm(weight_OI[:, panel] @ moment_II[panel, panel], weight_OI[:, behind], moment_II[behind, panel], alpha=2)
            energy += felt_OP.mul_(weight_OI[:, panel]).sum()
    return float(energy)
