"""Order of input channels in which an N:M pattern keeps more: channel permutation of RIA ("Plug-and-Play", ICLR 2024).

Legend: O outputs, I inputs, G groups of M channels. A lane is one place of every group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerogel.numerics.sparsity import kept_by_pattern


@torch.no_grad()
def channel_order(score_OI: Tensor, kept: int, of: int) -> Tensor:
    """Return order_I, the channels in the order in which `kept` of every `of` keep the most of the scores that was found.

    Channels are dealt in snake order of their sums, so that each group gets high and low ones; then, lane by lane, each group gets the
    channel with which the groups together keep most. Channels stay as they are where that keeps no more.
    """
    score_OI = score_OI.float()
    lanes_MG = score_OI.sum(0).argsort(descending=True, stable=True).view(of, -1)
    lanes_MG[1::2] = lanes_MG[1::2].flip(1)
    for lane in range(of):
        others_MG = torch.cat([lanes_MG[:lane], lanes_MG[lane + 1 :]])
        gain_GG = _gains(score_OI, others_MG, lanes_MG[lane], kept)
        lanes_MG[lane] = lanes_MG[lane][torch.from_numpy(assignment(-gain_GG.double().cpu().numpy())).to(lanes_MG.device)]
    order_I, as_is_I = lanes_MG.T.flatten(), torch.arange(score_OI.shape[1], device=score_OI.device)
    return order_I if kept_score(score_OI[:, order_I], kept, of) > kept_score(score_OI, kept, of) else as_is_I


def kept_score(score_OI: Tensor, kept: int, of: int) -> float:
    """Return the sum of the scores that a pattern keeps."""
    return float((score_OI.double() * kept_by_pattern(score_OI, kept, of)).sum())


def _gains(score_OI: Tensor, others_MG: Tensor, joining_G: Tensor, kept: int) -> Tensor:
    """What each group would keep more with each of the joining channels: where that is above the least of those it keeps now."""
    joining_OG = score_OI[:, joining_G]
    gains = []
    for others_M in others_MG.T:
        least_O1 = score_OI[:, others_M].topk(kept, dim=1).values[:, -1:]
        gains.append((joining_OG - least_O1).clamp_(min=0).sum(0))
    return torch.stack(gains)


def assignment(cost_NN: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the column of each row, each column taken once, with the least sum of costs: by shortest augmenting paths."""
    count = len(cost_NN)
    # Row and column 0 stand for none; each row enters once, and a path of changes makes room for it.
    of_row, of_column = np.zeros(count + 1), np.zeros(count + 1)
    row_of, before = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.int64)
    for row in range(1, count + 1):
        row_of[0], column = row, 0
        distance, seen = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=bool)
        while True:
            seen[column] = True
            here = row_of[column]
            reduced = np.concatenate([[np.inf], cost_NN[here - 1] - of_row[here] - of_column[1:]])
            nearer = ~seen & (reduced < distance)
            distance[nearer], before[nearer] = reduced[nearer], column
            column = int(np.where(seen, np.inf, distance).argmin())
            step = distance[column]
            of_row[row_of[seen]] += step
            of_column[seen] -= step
            distance[~seen] -= step
            if row_of[column] == 0:
                break
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    found = np.empty(count, dtype=np.int64)
    found[row_of[1:] - 1] = np.arange(count)
    return found
