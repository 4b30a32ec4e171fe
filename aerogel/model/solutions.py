"""Weights of layers that are solved together by the Hessian of their inputs, and how processes share the work.

Letters in names: B problems of one shape, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from aerogel.layers.conv import Layer, matrix
from aerogel.model.processes import Processes
from aerogel.model.statistics import InputStatistics
from aerogel.numerics.quantize import Grid, grouped
from aerogel.numerics.scheme import PerBlock, PerChannel, PerGroup, TensorScheme

BATCH_VALUES = 1 << 26
"""About how many numbers the problems that are solved together may hold."""


@dataclass(eq=False)
class Problem:
    """Linear layers, or convolutions, that read the same inputs and are solved as one weight."""

    linears: dict[str, Layer]
    statistics: InputStatistics | None
    """Their input; None when no token reached them."""

    @property
    def columns(self) -> int:
        """The number of inputs they read; of a convolution, the places of its kernel."""
        return matrix(next(iter(self.linears.values()))).shape[1]

    def weight(self) -> Tensor:
        """The rows of all layers, weight_OI in float32."""
        return torch.cat([matrix(linear).detach().float() for linear in self.linears.values()])

    def hessian(self) -> Tensor:
        """The hessian_II of the inputs; zeros when there were none."""
        if self.statistics is None:
            return next(iter(self.linears.values())).weight.new_zeros(self.columns, self.columns, dtype=torch.float32)
        return self.statistics.moment()

    def fallback(self, failed: bool, instead: str) -> dict[str, str]:
        """Return the note of a solution without a Hessian, where none was seen or its factorisation `failed`."""
        if self.statistics is None:
            return {"fallback": f"{instead}: no token reached it"}
        return {"fallback": f"{instead}: the Hessian is not positive definite"} if failed else {}

    def rows(self) -> Iterator[tuple[str, Layer, slice]]:
        """Yield the layers by name, each with its rows of the weight."""
        first = 0
        for name, linear in self.linears.items():
            outputs = len(linear.weight)
            yield name, linear, slice(first, first + outputs)
            first += outputs


_Any = TypeVar("_Any", bound=Problem)


def batches(problems: Iterable[_Any], kind: Callable[[_Any], object]) -> Iterator[list[_Any]]:
    """Yield problems of one shape and kind together, as many as memory allows."""
    alike: dict[tuple[int, int, object], list[_Any]] = {}
    for problem in problems:
        outputs = sum(len(linear.weight) for linear in problem.linears.values())
        alike.setdefault((outputs, problem.columns, kind(problem)), []).append(problem)
    for (outputs, inputs, _), group in alike.items():
        most = max(1, BATCH_VALUES // (inputs * (4 * inputs + 5 * outputs)))
        yield from (group[first : first + most] for first in range(0, len(group), most))


def stack(tensors: list[Tensor]) -> Tensor:
    """Return torch.stack of tensors, but without a copy of a single one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


class Solution(NamedTuple):
    """Integer codes and grids of problems of one shape, or weights where nothing is quantized."""

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
    def of(cls, processes: Processes, weight_BOI: Tensor, rows_apart: bool) -> Share:
        """Return the part of this process; `rows_apart` says that rows can be solved without the others."""
        problems, rows = weight_BOI.shape[:2]
        by_rows = problems < processes.count <= rows and rows_apart
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


def group_width(scheme: TensorScheme, columns: int) -> int:
    """Return the columns that share a scale."""
    match scheme.granularity:
        case PerGroup(size):
            return size
        case PerBlock(_, width):
            return width
        case _:
            return columns


def row_grids(grids: Sequence[Grid], scheme: TensorScheme, rows: int) -> Grid:
    """Return the grids of B weights as one, with a row of scales for each output: scale_BOG."""

    def spread(grid_tensor: Tensor) -> Tensor:
        if isinstance(scheme.granularity, PerBlock):
            return grid_tensor.repeat_interleave(scheme.granularity.rows, dim=0)[:rows]
        return grid_tensor.reshape(-1, grid_tensor.shape[-1] if grid_tensor.ndim else 1).expand(rows, -1)

    zeros = [spread(grid.zero) for grid in grids if grid.zero is not None]
    return Grid(torch.stack([spread(grid.step) for grid in grids]), torch.stack(zeros) if zeros else None)


def importance_of(importance_I: Tensor, weight_OI: Tensor, scheme: TensorScheme) -> Tensor:
    """Return the importance of columns as `grouped` lays out the weight; where rows have scales of their own, once for all of them."""
    rows = 1 if isinstance(scheme.granularity, PerGroup | PerChannel) else len(weight_OI)
    return grouped(importance_I.expand(rows, -1), scheme.granularity)
