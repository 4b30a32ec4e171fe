"""Rounded weights of layers that are solved together, and how processes share the work.

Letters in names: B problems of one shape, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aerogel.model.processes import Processes
from aerogel.numerics.quantize import Grid
from aerogel.numerics.scheme import PerChannel, PerGroup, TensorScheme


class Solution(NamedTuple):
    """Integer codes and grids of problems of one shape."""

    codes_BOI: Tensor
    loss_BO: Tensor
    """Squared error of each output."""
    grids: list[Grid]
    g_idx_BI: Tensor | None
    """Group of each column, where groups follow the new order."""
    damping_B: Tensor
    failed_B: Tensor


def has_scales_of_rows(scheme: TensorScheme) -> bool:
    """Return True where every row has scales of its own, so that rows can be solved together or apart."""
    return isinstance(scheme.granularity, PerGroup | PerChannel) and scheme.scale_format != "e4m3"


class Share(NamedTuple):
    """The part of some problems that a process solves: whole problems where there are enough of them, else rows of each.

    Rows are independent once the Hessian is factorised. Each process factorises it anew: while one did it for all, the others would wait,
    as the problems of a dense model come one after another. Rows with a common scale stay together, whoever else has nothing to do then.
    """

    processes: Processes
    by_rows: bool
    problems: slice
    rows: slice

    @classmethod
    def of(cls, processes: Processes, weight_BOI: Tensor, scheme: TensorScheme) -> Share:
        """Return the part of this process."""
        problems, rows = weight_BOI.shape[:2]
        by_rows = problems < processes.count <= rows and has_scales_of_rows(scheme)
        mine, whole = processes.share(rows if by_rows else problems), slice(None)
        part = slice(mine.start, mine.stop)
        return cls(processes, True, whole, part) if by_rows else cls(processes, False, part, whole)

    def together(self, mine: Solution | None, device: torch.device) -> Solution:
        """Put the solutions of all processes together; None is that of a process without a part."""
        parts: list[Solution] = [part for part in self.processes.gather_nested(mine, device) if part is not None]
        if len(parts) == 1:
            return parts[0]
        if self.by_rows:
            grids = [_rows_together(grids) for grids in zip(*(part.grids for part in parts), strict=True)]
            codes_BOI, loss_BO = _cat([part.codes_BOI for part in parts], 1), torch.cat([part.loss_BO for part in parts], 1)
            return parts[0]._replace(codes_BOI=codes_BOI, loss_BO=loss_BO, grids=grids)
        g_idx = [part.g_idx_BI for part in parts if part.g_idx_BI is not None]
        return Solution(
            _cat([part.codes_BOI for part in parts], 0),
            torch.cat([part.loss_BO for part in parts]),
            [grid for part in parts for grid in part.grids],
            torch.cat(g_idx) if g_idx else None,
            torch.cat([part.damping_B for part in parts]),
            torch.cat([part.failed_B for part in parts]),
        )


def _rows_together(grids: Sequence[Grid]) -> Grid:
    """The grid of a weight from those of runs of its rows."""
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    return Grid(torch.cat([grid.scale for grid in grids]), torch.cat(zeros) if zeros else None)


def _cat(codes: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat for codes of one byte, among them fp8, which it does not know."""
    return torch.cat([part.view(torch.uint8) for part in codes], dim).view(codes[0].dtype)
