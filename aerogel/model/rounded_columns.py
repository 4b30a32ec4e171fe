"""Rounding of the weights of problems, column by column in the order of GPTQ, with the grids of the columns (arXiv:2210.17323).

Letters in names: B problems of one shape, O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from aerogel.model.solutions import Solution, group_width, importance_of, row_grids, stack
from aerogel.numerics.feedback import feedback, round_columns
from aerogel.numerics.quantize import Grid, grouped
from aerogel.numerics.scheme import TensorScheme
from aerogel.numerics.search import Shared

ActOrder = Literal["none", "static", "group"]

_ROWS = 512
"""Rows of a Hessian that are reordered at once."""


def round_problems(
    weight_BOI: Tensor,
    hessian_BII: Tensor,
    scheme: TensorScheme,
    fit: Callable[[Tensor, Tensor, Shared | None], Grid],
    moves: bool = False,
    act_order: ActOrder = "static",
    damping: float = 0.01,
    kept_BOI: Tensor | None = None,
    shared_B: Sequence[Shared | None] | None = None,
) -> Solution:
    """Round the weights of problems column by column so that the outputs for inputs with these Hessians change little.

    `fit` makes a stored grid from weights laid out by `quantize.grouped`, the importance of their errors and what they share
    with others, if anything. With `moves` (groups only) the grid of a group is made when its turn comes, from weights that have taken
    the errors before it; otherwise grids are made from the weights as they are. Where `kept_BOI` is False, weights are pruned and stay
    zero.
    """
    columns = weight_BOI.shape[-1]
    as_is_BI = torch.arange(columns, device=weight_BOI.device).expand(len(weight_BOI), -1)
    width, size = group_width(scheme, columns), -(-columns // group_width(scheme, columns))
    order_BI = as_is_BI
    if act_order != "none":
        order_BI = hessian_BII.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    place_BI = order_BI.argsort(dim=-1)
    hessian_BII = _reordered(hessian_BII, order_BI)
    found = feedback(hessian_BII, damping)
    del hessian_BII
    if moves:
        blank = weight_BOI.new_zeros(*weight_BOI.shape[:2], size)
        grid, group_BI = Grid(blank, None if scheme.symmetric else blank.to(scheme.format.storage)), as_is_BI // width
    else:
        importance_BI = found.importance_BI.take_along_dim(place_BI, 1)
        grids = [
            fit(grouped(weight_OI, scheme.granularity), importance_of(importance_I, weight_OI, scheme), shared)
            for weight_OI, importance_I, shared in zip(weight_BOI, importance_BI, shared_B or [None] * len(weight_BOI), strict=True)
        ]
        grid, group_BI = row_grids(grids, scheme, weight_BOI.shape[1]), order_BI // width

    def fit_now(weight_BOn: Tensor, low: int, high: int) -> Grid:
        return fit(weight_BOn, found.importance_BI[:, None, low:high], None)

    ordered_BOI = _columns(weight_BOI, order_BI)
    if kept_BOI is not None:
        kept_BOI = _columns(kept_BOI, order_BI)
    rounded = round_columns(ordered_BOI, found, scheme.format, grid, group_BI, fit_now if moves else None, width, kept_BOI)
    if moves:
        grids = [Grid(grid.scale[b], None if grid.zero is None else grid.zero[b]) for b in range(len(weight_BOI))]
    g_idx_BI = place_BI // width if moves and act_order == "group" else None
    return Solution(_columns(rounded.codes_BOI, place_BI), rounded.loss_BO, grids, g_idx_BI, found.damping_B, found.failed_B)


def _columns(x_BOI: Tensor, order_BI: Tensor) -> Tensor:
    """Return the columns of each problem in its order; one problem after another takes a quarter of the time of one gather."""
    bytes_BOI = x_BOI if x_BOI.element_size() > 1 else x_BOI.view(torch.uint8)  # fp8 cannot be gathered
    return stack([x_OI.index_select(1, order_I) for x_OI, order_I in zip(bytes_BOI, order_BI, strict=True)]).view(x_BOI.dtype)


def _reordered(hessian_BII: Tensor, order_BI: Tensor) -> Tensor:
    """Return Hessians with rows and columns in the order of their problem."""
    made_BII = torch.empty_like(hessian_BII)
    for made_II, hessian_II, order_I in zip(made_BII, hessian_BII, order_BI, strict=True):
        for made_NI, rows_N in zip(made_II.split(_ROWS), order_I.split(_ROWS), strict=True):
            torch.index_select(hessian_II.index_select(0, rows_N), 1, order_I, out=made_NI)
    return made_BII
