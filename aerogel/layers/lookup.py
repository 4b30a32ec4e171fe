"""Answers out of a table of all steps, in the place of a module that depends on the step alone.

T steps, C width of an answer, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aerogel.layers.timestep_index import TimestepIndex
from aerogel.numerics.quantize import Grid


class Lookup:
    """Table that is called in place of a module's forward (hooks.patch_forward); exporters find it by hooks.patched."""

    def __init__(self, index: TimestepIndex, kept_TC: Tensor, grid: Grid | None, chosen_T: Tensor, computed: Callable[..., Tensor]) -> None:
        """`kept_TC` are floats, or integer codes of `grid`; `chosen_T` says at which steps they answer, at the others `computed` does."""
        self.index, self.kept_TC, self.grid, self.chosen_T = index, kept_TC, grid, chosen_T
        self._computed = computed
        self._table_TC, self._from_table = dequantized(kept_TC, grid), chosen_T.tolist()

    def __call__(self, x_NC: Tensor, *rest: Any) -> Tensor:
        """Return the answers (N, C) of the steps that the samples are at; of the input only its size, dtype and place matter then."""
        rows = self.index.rows if len(self.index.rows) == len(x_NC) else self.index.rows * len(x_NC)
        table = self._table_TC.to(x_NC.device, x_NC.dtype)
        if not any(self._from_table[row] for row in rows):
            return self._computed(x_NC, *rest)
        if len(set(rows)) == 1:
            return table[rows[0]].expand(len(rows), -1)
        looked = table[list(rows)]
        if all(self._from_table[row] for row in rows):
            return looked
        mask_N1 = torch.tensor([[self._from_table[row]] for row in rows], device=x_NC.device)
        return torch.where(mask_N1, looked, self._computed(x_NC, *rest))


def dequantized(kept_TC: Tensor, grid: Grid | None) -> Tensor:
    """Return the floats that integer codes (T, C) under a scale and zero point a row (T, 1) stand for; floats are returned as they are."""
    if grid is None:
        return kept_TC
    zero_T1 = 0.0 if grid.zero is None else grid.zero.float()
    return (kept_TC.float() - zero_T1) * grid.scale
