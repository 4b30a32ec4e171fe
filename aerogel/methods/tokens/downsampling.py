"""Features of images on a coarser grid, the baseline that a rule has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.methods.tokens.policy import Budget, TokenPolicy, within_budget
from aerogel.runtime.tokens.grids import grids_of
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Downsampling(TokenPolicy):
    """Averages the embeddings of an image over cells of a coarser grid before the first block; a mean has the place of its cell's middle.

    The grid is the finest of about the image's shape that the budget allows, so fewer tokens than it says may stay.
    """

    keep: Budget = 0.25
    """Image tokens of a row that stay at most: a number, or a share; of several images each gets its part."""

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {0: self.choose}

    def choose(self, stage: Stage) -> Selection | None:
        """Average image by image."""
        if (count_B := within_budget(stage, self.keep)) is None:
            return None
        keep_BK, hidden_BKC = ~stage.vision_BK, stage.hidden_BKC.clone()
        separator_BK, video_BK = stage.kept.rows(stage.separator_BN), stage.kept.rows(stage.video_BN)
        for grid in grids_of(stage.vision_BK, stage.inputs, separator_BK, video_BK):
            share = float(count_B[grid.row]) / float(stage.vision_total_B[grid.row])
            for middle, cell_P in cells(grid.height, grid.width, share * len(grid.place_P)):
                place = grid.place_P[middle]
                keep_BK[grid.row, place] = True
                hidden_BKC[grid.row, place] = stage.hidden_BKC[grid.row, grid.place_P[cell_P]].mean(0)
        return Selection(keep_BK, hidden_BKC)


def cells(height: int, width: int, count: float) -> Iterator[tuple[int, Tensor]]:
    """Yield the middle and all places of each cell of the finest grid of about the same shape with at most `count` cells, one at least."""
    rows, columns = coarse(height, width, count)
    number_HW = torch.arange(height * width).reshape(height, width)
    for part in number_HW.tensor_split(rows, dim=0):
        for cell in part.tensor_split(columns, dim=1):
            yield int(cell[len(cell) // 2, cell.shape[1] // 2]), cell.flatten()


def coarse(height: int, width: int, count: float) -> tuple[int, int]:
    """Return rows and columns of that grid: as many cells as may be, then as near to the image's shape as may be."""
    tried = [(rows, min(width, int(count // rows))) for rows in range(1, min(height, max(1, int(count))) + 1)]
    fits = [(rows, columns) for rows, columns in tried if columns] or [(1, 1)]
    shape = [(rows, columns) for rows, columns in fits if 0.5 <= rows * width / (columns * height) <= 2] or fits
    return max(shape, key=lambda pair: (pair[0] * pair[1], -abs(pair[0] / pair[1] - height / width)))
