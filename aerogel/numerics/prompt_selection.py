"""Scores of blocks of a prompt and the choice among them; everything is deterministic, and of equal scores the earlier one wins.

B rows, K positions, G groups of positions, U sub-blocks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["max", "mean"]


def group_sums(score_BK: Tensor, group_BK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the scores of each group (B, G) and its number of positions; those of group -1 count nowhere."""
    slot_BK = torch.where(group_BK < 0, groups, group_BK)
    zero_BG = score_BK.new_zeros(len(score_BK), groups + 1, dtype=torch.float32)
    sum_BG = zero_BG.scatter_add(1, slot_BK, score_BK.float())
    count_BG = zero_BG.scatter_add(1, slot_BK, torch.ones_like(score_BK, dtype=torch.float32))
    return sum_BG[:, :groups], count_BG[:, :groups]


def block_scores(score_BK: Tensor, place_BK: Tensor, sub_block: int, block: int, blocks: int, reduce: Reduce = "max") -> Tensor:
    """Return the score of each block (B, G): the largest or the mean of the scores of its sub-blocks, which are means over their positions.

    `place_BK` are places from the first block on, -1 for positions of no block. Blocks that are not there are -inf.
    """
    sum_BU, count_BU = group_sums(score_BK, torch.where(place_BK < 0, -1, place_BK // sub_block), blocks * (block // sub_block))
    score_BU = (sum_BU / count_BU.clamp(min=1)).masked_fill(count_BU == 0, -torch.inf)
    score_BGU = score_BU.unflatten(1, (blocks, block // sub_block))
    return score_BGU.amax(-1) if reduce == "max" else score_BGU.mean(-1)


def smallest_mass(score_BG: Tensor, there_BG: Tensor, share: float) -> Tensor:
    """Return a mask of the fewest groups that together have this share of the sum of scores of a row, the best one always among them.

    Scores are at least zero; groups that are not there are never chosen.
    """
    score_BG = score_BG.double().masked_fill(~there_BG, 0)
    order_BG = score_BG.masked_fill(~there_BG, -1).argsort(dim=1, descending=True, stable=True)
    sorted_BG = score_BG.gather(1, order_BG)
    before_BG = sorted_BG.cumsum(1) - sorted_BG
    enough_BG = before_BG >= share * sorted_BG.sum(1, keepdim=True)
    enough_BG[:, 0] = False
    return torch.zeros_like(there_BG).scatter(1, order_BG, ~enough_BG) & there_BG


def mean_pool(score_BK: Tensor, width: int) -> Tensor:
    """Return the mean over a window around each position (..., K); what lies beyond the ends counts as zero. The width is odd."""
    shape = score_BK.shape
    pooled = torch.nn.functional.avg_pool1d(score_BK.reshape(-1, 1, shape[-1]), width, stride=1, padding=width // 2)
    return pooled.reshape(shape)


def max_pool(score_BK: Tensor, width: int) -> Tensor:
    """Return the largest score in a window around each position (..., K). The width is odd."""
    shape = score_BK.shape
    return torch.nn.functional.max_pool1d(score_BK.reshape(-1, 1, shape[-1]), width, stride=1, padding=width // 2).reshape(shape)
