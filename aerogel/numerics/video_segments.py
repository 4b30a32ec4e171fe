"""Segments of a video: frames in one row that are alike, found by cuts, by dynamic programming or by clusters.

F frames, P places of a frame, C channels. Segments are ranges of frames, in order, and cover all frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from aerogel.numerics.token_selection import density_peaks


def likeness(x_FC: Tensor) -> Tensor:
    """Return the cosine of each frame and the next (F - 1, ...), of each place where there are places; at most 1."""
    return cosine_similarity(x_FC[:-1].float(), x_FC[1:].float(), dim=-1).clamp(max=1.0)


def cut_where_unlike(likeness_S: Tensor, least: int, threshold: float) -> list[range]:
    """Cut at the `least - 1` places where neighbours are least alike, and wherever they are less alike than `threshold` (FastVID)."""
    lowest = likeness_S.argsort(stable=True)[: least - 1].tolist()
    below = (likeness_S < threshold).nonzero()[:, 0].tolist()
    ends = [0, *sorted({place + 1 for place in (*lowest, *below)}), len(likeness_S) + 1]
    return [range(start, end) for start, end in pairwise(ends)]


def best_windows(static_SP: Tensor, longest: int) -> list[range]:
    """Cut so that most tokens repeat (HoliTom): a window of frames saves its length less one for each place that is static in all of it.

    `static_SP` (F - 1, P) says of each step to the next frame which places stay the same. Windows have up to `longest` frames, so that
    work and memory grow with F x longest x P. Of equal savings, frames that save nothing stay alone and windows are short.
    """
    frames = len(static_SP) + 1
    saved, start_of = [0], [0]
    for end in range(1, frames + 1):
        best, start = saved[end - 1], end - 1
        same_P = torch.ones(static_SP.shape[1], dtype=torch.bool, device=static_SP.device)
        for length in range(2, min(end, longest) + 1):
            same_P = same_P & static_SP[end - length]
            gain = saved[end - length] + int(same_P.sum()) * (length - 1)
            if gain > best:
                best, start = gain, end - length
        saved.append(best)
        start_of.append(start)
    windows, end = [], frames
    while end:
        windows.append(range(start_of[end], end))
        end = start_of[end]
    return windows[::-1]


def clustered(x_FC: Tensor, clusters: int, neighbours: int) -> list[range]:
    """Cluster frames by density peaks, and make segments of the clusters (PruneVid)."""
    return runs(contiguous(density_peaks(x_FC, clusters, neighbours).group_N.tolist()))


def contiguous(label_F: Sequence[int]) -> list[int]:
    """Return labels in which each keeps its longest runs alone, and none of a single frame; other frames go to the longer neighbour.

    Of equal neighbours the left one gets them; where nothing is left, all frames have one label.
    """
    given = runs(label_F)
    longest = {label: max(len(run) for run in given if label_F[run[0]] == label) for label in set(label_F)}
    kept: list[int | None] = [None] * len(label_F)
    for run in given:
        label = label_F[run[0]]
        if len(run) > 1 and len(run) == longest[label]:
            kept[run.start : run.stop] = [label] * len(run)
    for gap in runs(kept):
        if kept[gap[0]] is None:
            kept[gap.start : gap.stop] = [_neighbour(kept, gap)] * len(gap)
    return [0 if label is None else label for label in kept]


def _neighbour(label_F: Sequence[int | None], gap: range) -> int | None:
    """The label of the longer of the runs beside a gap."""
    beside = [run for run in runs(label_F) if run.stop == gap.start or run.start == gap.stop]
    return label_F[max(beside, key=len)[0]] if beside else None


def runs(label_F: Sequence[object]) -> list[range]:
    """Return the ranges of equal labels in a row."""
    ends = [0]
    for _, group in groupby(label_F):
        ends.append(ends[-1] + len(list(group)))
    return [range(start, end) for start, end in pairwise(ends)]


def static_places(x_FPC: Tensor, threshold: float) -> Tensor:
    """Return a mask of the places (P) whose tokens are alike in all frames: a mean cosine over pairs above the threshold.

    A single frame has none (PruneVid's published code divides by zero there).
    """
    frames = len(x_FPC)
    if frames == 1:
        return torch.zeros(x_FPC.shape[1], dtype=torch.bool, device=x_FPC.device)
    together_P = normalize(x_FPC.float(), dim=-1).sum(0).square().sum(-1)
    mean_P = (together_P - frames) / (frames * (frames - 1))
    return mean_P.clamp(max=1.0) > threshold
