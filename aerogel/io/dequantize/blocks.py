"""The arithmetic that most formats share: values minus a zero point, times a scale, where a block of the weight shares both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.numerics.packing import unpack_e8m0

_ROWS = 1024
"""Rows that are multiplied at a time, so that float32 copies stay small."""


def dequantize_blocks(
    weight_OI: Tensor,
    scale_RC: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    zero_RC: Tensor | None = None,
    column_I: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Return (weight - zero) * scale of its block, in float32 and then rounded to `dtype`; the last blocks may be smaller than `block`.

    Leading dimensions of the weight are kept; a single scale grid is for all of them. `column_I` says which column of the grid each input
    has, where those of a block do not follow one another. `table` has the values that a weight of codes stands for.
    """
    rows, columns = weight_OI.shape[-2:]
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    matrices = weight_OI.reshape(-1, rows, columns)
    scales = numbers(scale_RC).reshape(-1, *grid).expand(len(matrices), *grid)
    zeros = None if zero_RC is None else zero_RC.float().reshape(grid)
    if column_I is None:
        column_I = torch.arange(columns, device=scale_RC.device) // block[1]
    found = torch.empty(matrices.shape, dtype=dtype, device=weight_OI.device)
    for matrix, scale, out in zip(matrices, scales, found, strict=True):
        for start in range(0, rows, _ROWS):
            part = matrix[start : start + _ROWS]
            part = part.to(torch.float32, copy=True) if table is None else table[part.int()]
            row = torch.arange(start, start + len(part), device=scale.device) // block[0]
            if zeros is not None:
                part -= _spread(zeros[row], column_I)
            part *= _spread(scale[row], column_I)
            out[start : start + _ROWS] = part
    return found.reshape(weight_OI.shape)


def numbers(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents."""
    return unpack_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()


def _spread(of_rows: Tensor, column_I: Tensor) -> Tensor:
    """Give each input that of its column of the grid, where there are several."""
    return of_rows.index_select(1, column_I) if of_rows.shape[1] > 1 else of_rows


def shared_by(block: tuple[int, int], weight: tuple[int, ...]) -> str:
    """Return in words what shares a scale in a weight of this shape."""
    rows, columns = weight[-2:]
    if block == (rows, columns):
        return "tensor"
    if block == (1, columns):
        return "channel"
    return f"group of {block[1]}" if block[0] == 1 else f"block of {block[0]} x {block[1]}"
