"""Fewer tokens of a video: rules that drop and merge tokens of frames, on features alone; all are deterministic.

F frames, P places of a frame, C channels, N tokens of a set. A token that stands for others has the place of one of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from aerogel.numerics.token_selection import best, density_peaks, means
from aerogel.numerics.video_segments import best_windows, clustered, cut_where_unlike, likeness, static_places


class Reduced(NamedTuple):
    """Tokens of a video that stay."""

    keep_FP: Tensor
    """True where a token stays."""
    x_FPC: Tensor
    """Features, with those of merged tokens where they stay; where a token does not stay they mean nothing."""


def part(share: float, whole: int) -> int:
    """Return the whole number below a share of some tokens; what floating point takes away from a product does not count."""
    return int(share * whole + 1e-9)


def dycoke(x_FPC: Tensor, keep: float) -> Reduced:
    """Keep the first of four frames whole, and of the others the share of tokens least like those of the same place before (DyCoke).

    The second is compared with the first, the fourth with the third, and the third with the first. A last group of fewer than four frames
    is treated alike.
    """
    frames, places, _ = x_FPC.shape
    keep_FP = torch.ones(frames, places, dtype=torch.bool, device=x_FPC.device)
    for frame in range(frames):
        if frame % 4:
            before = frame - 2 if frame % 4 == 2 else frame - 1
            unlike_P = -cosine_similarity(x_FPC[frame].float(), x_FPC[before].float(), dim=-1)
            keep_FP[frame] = _highest(unlike_P, part(keep, places))
    return Reduced(keep_FP, x_FPC)


def evs(x_FPC: Tensor, pruning_rate: float) -> Tensor:
    """Keep the first frame, and of all other tokens those that are least like the token of the same place in the frame before (EVS).

    Returns True where a token stays (F, P). The number that stays, the order of equal tokens (earlier ones first) and the precision, which
    is that of the features, are those of vLLM, so that both keep the same.
    """
    frames, places, _ = x_FPC.shape
    count = max(places, int(frames * places * (1 - pruning_rate)))
    unlike_SP = 1 - cosine_similarity(x_FPC[1:], x_FPC[:-1], dim=-1)
    first_P = x_FPC.new_full((places,), 255.0)  # no cosine is so far from one
    order_N = torch.cat((first_P, unlike_SP.flatten())).argsort(descending=True, stable=True)
    keep_N = torch.zeros(frames * places, dtype=torch.bool, device=x_FPC.device)
    keep_N[order_N[:count]] = True
    return keep_N.view(frames, places)


def prunevid(x_FPC: Tensor, segments: float, threshold: float, merged: float, least: int = 14, neighbours: int = 7) -> Reduced:
    """Merge what stays the same in a segment of frames, then what is alike in a frame (PruneVid, first stage).

    Segments are clusters of frames, a share `segments` of their number. In each, places that are static become a temporal mean, in the
    first frame. The static tokens of a segment, and the others of each frame, become a share `merged` of them, one at least, where they are
    more than `least`.
    """
    keep_FP = torch.ones(x_FPC.shape[:2], dtype=torch.bool, device=x_FPC.device)
    x_FPC = x_FPC.clone()
    for segment in clustered(x_FPC.float().mean(1), max(1, part(segments, len(x_FPC))), neighbours):
        static_P = static_places(x_FPC[segment.start : segment.stop], threshold)
        keep_FP[segment.start + 1 : segment.stop] &= ~static_P
        x_FPC[segment.start, static_P] = x_FPC[segment.start : segment.stop, static_P].mean(0)
        for frame in segment:
            for chosen_P in (static_P, ~static_P) if frame == segment.start else (~static_P,):
                number_N = chosen_P.nonzero()[:, 0]
                count = max(1, part(merged, len(number_N)))
                if least < len(number_N) and count < len(number_N):
                    found = density_peaks(x_FPC[frame, number_N], count, neighbours)
                    mean_GC = means(x_FPC[frame, number_N], found.group_N, len(found.centre_G))
                    _put(keep_FP[frame], x_FPC[frame], number_N, found.centre_G, mean_GC)
    return Reduced(keep_FP, x_FPC)


class Holitom(NamedTuple):
    """Settings of HoliTom's first stage."""

    keep: float
    """Share of all tokens that stay."""
    threshold: float = 0.65
    """Cosine to the next frame above which a token is static."""
    clustered: float = 0.0
    """Share of the tokens of a frame that stay by clusters instead of by attention."""
    centre: float = 0.6
    """Weight of the token at a cluster's centre, against the mean of the others."""
    longest: int = 1024
    """Most frames of a window."""
    neighbours: int = 7
    """Neighbours that density is measured by."""


def holitom(x_FPC: Tensor, attention_FP: Tensor | None, settings: Holitom) -> Reduced:
    """Merge static tokens in the windows that save most, then keep a share of each window's static and each frame's other tokens.

    The share is that which keeps so many of all tokens once the static ones are merged. Static tokens, in the first frame of a window, are
    merged by clusters; of the others those that get most attention stay.
    """
    frames, places, _ = x_FPC.shape
    keep_FP = torch.ones(frames, places, dtype=torch.bool, device=x_FPC.device)
    if settings.keep >= 1:
        return Reduced(keep_FP, x_FPC)
    attention_FP = x_FPC.new_zeros(frames, places) if attention_FP is None else attention_FP
    static_SP = likeness(x_FPC) > settings.threshold
    x_FPC = x_FPC.clone()
    windows = [(window, _static_in(static_SP, window, places)) for window in best_windows(static_SP, settings.longest)]
    removed = sum(int(static_P.sum()) * (len(window) - 1) for window, static_P in windows)
    share = min(1.0, settings.keep / (1 - removed / (frames * places)))
    for window, static_P in windows:
        keep_FP[window.start + 1 : window.stop] &= ~static_P
        x_FPC[window.start, static_P] = x_FPC[window.start : window.stop, static_P].mean(0)
        count = round(int(static_P.sum()) * share)
        _cluster(keep_FP[window.start], x_FPC[window.start], static_P.nonzero()[:, 0], count, settings)
        for frame in window:
            _by_attention(keep_FP[frame], x_FPC[frame], ~static_P, attention_FP[frame], share, settings)
    return Reduced(keep_FP, x_FPC)


def _static_in(static_SP: Tensor, window: range, places: int) -> Tensor:
    """The places (P) that are static in a window; none in a single frame."""
    if len(window) == 1:
        return torch.zeros(places, dtype=torch.bool, device=static_SP.device)
    return static_SP[window.start : window.stop - 1].all(0)


def _by_attention(keep_P: Tensor, x_PC: Tensor, chosen_P: Tensor, attention_P: Tensor, share: float, settings: Holitom) -> None:
    """Keep a share of the chosen tokens of a frame: by attention, and a part of them as clusters of the rest."""
    whole = math.ceil(int(chosen_P.sum()) * share - 1e-9)
    strongest = round(whole * (1 - settings.clustered))
    strongest_P = best(attention_P[None], chosen_P[None], torch.tensor([strongest], device=x_PC.device))[0]
    rest_N = (chosen_P & ~strongest_P).nonzero()[:, 0]
    keep_P[rest_N] = False
    _cluster(keep_P, x_PC, rest_N, whole - strongest, settings)


def _cluster(keep_P: Tensor, x_PC: Tensor, number_N: Tensor, count: int, settings: Holitom) -> None:
    """Keep so many of some tokens: centres of clusters, mixed with the mean of those around them."""
    if count >= len(number_N):
        keep_P[number_N] = True
        return
    keep_P[number_N] = False
    if not count:
        return
    found = density_peaks(x_PC[number_N], count, min(settings.neighbours, count))
    centres_GC = x_PC[number_N[found.centre_G]]
    around_N = torch.ones(len(number_N), device=x_PC.device)
    around_N[found.centre_G] = 0
    others_G = torch.zeros(count, device=x_PC.device).index_add_(0, found.group_N, around_N)
    mixed_GC = settings.centre * centres_GC + (1 - settings.centre) * means(x_PC[number_N], found.group_N, count, around_N)
    _put(keep_P, x_PC, number_N, found.centre_G, torch.where(others_G[:, None] > 0, mixed_GC, centres_GC))


class Fastvid(NamedTuple):
    """Settings of FastVID."""

    keep: float
    """Share of the tokens of a frame that stays, on average."""
    contextual: float = 0.4
    """Share of these that are anchors of merged tokens; the others are those with most attention."""
    segments: int = 8
    """Segments at least."""
    threshold: float = 0.9
    """Cosine of neighbouring frames below which a segment ends."""
    every: int = 4
    """Frames from one with anchors to the next, counted from the end of a segment."""
    anchor: float = 0.6
    """Least weight of an anchor in its mean."""
    neighbours: int = 4
    """Neighbours that density is measured by."""


def fastvid(x_FPC: Tensor, vector_FD: Tensor, attention_FP: Tensor, settings: Fastvid) -> Reduced:
    """Keep the tokens of each frame with most attention, and anchors in a few frames of each segment that the others are merged into.

    `vector_FD` stand for the frames: segments end where they are unlike. A segment has as many anchors as if each frame had its share of
    them, in every fourth frame counted from its end, at density peaks. All tokens of the segment that do not stay by attention go to the
    anchors of each such frame by cosine: new = w anchor + (1 - w) mean, w = max(1 / (n + 1), `anchor`) for n tokens, the anchor among them.
    """
    frames, places, _ = x_FPC.shape
    stays = part(settings.keep, places)
    contextual = part(settings.contextual, stays)
    if stays >= places:
        return Reduced(torch.ones(frames, places, dtype=torch.bool, device=x_FPC.device), x_FPC)
    keep_FP = torch.stack([_highest(attention_P, stays - contextual) for attention_P in attention_FP])
    salient_FP, x_old_FPC, x_FPC = keep_FP.clone(), x_FPC, x_FPC.clone()
    for segment in cut_where_unlike(likeness(vector_FD), settings.segments, settings.threshold):
        anchored = range(segment.stop - 1, segment.start - 1, -settings.every)
        each = min(contextual * len(segment) // len(anchored), places - stays + contextual)
        free_NC = x_old_FPC[segment.start : segment.stop][~salient_FP[segment.start : segment.stop]]
        for frame in anchored if each else ():
            number_N = (~salient_FP[frame]).nonzero()[:, 0]
            centre_G = density_peaks(x_old_FPC[frame, number_N], each, settings.neighbours).centre_G
            merged_GC = _merged_into(x_old_FPC[frame, number_N[centre_G]], free_NC, settings.anchor)
            _put(keep_FP[frame], x_FPC[frame], number_N[centre_G], torch.arange(each, device=x_FPC.device), merged_GC)
    return Reduced(keep_FP, x_FPC)


def _merged_into(anchor_GC: Tensor, free_NC: Tensor, least: float) -> Tensor:
    """Anchors with the tokens that are most like them mixed in."""
    group_N = (normalize(free_NC.float(), dim=-1) @ normalize(anchor_GC.float(), dim=-1).T).argmax(1)
    size_G = torch.bincount(group_N, minlength=len(anchor_GC))
    weight_G1 = (1 / (size_G + 1).float()).clamp(min=least)[:, None].to(anchor_GC.dtype)
    return weight_G1 * anchor_GC + (1 - weight_G1) * means(free_NC, group_N, len(anchor_GC))


def fold(x_NC: Tensor, keep_N: Tensor) -> Tensor:
    """Return tokens (N, C) of which those that stay are means of themselves and of the dropped ones that are most like them, by cosine.

    Each token counts once; the order in which they are folded does not matter, as it does in HoliTom's published code.
    """
    unit_NC = normalize(x_NC.float(), dim=-1)
    number_G = keep_N.nonzero()[:, 0]
    group_N = (unit_NC @ unit_NC[number_G].T).argmax(1)
    group_N[number_G] = torch.arange(len(number_G), device=x_NC.device)
    folded_NC = x_NC.clone()
    folded_NC[number_G] = means(x_NC, group_N, len(number_G))
    return folded_NC


def _highest(score_P: Tensor, count: int) -> Tensor:
    """A mask of the highest scores; of equal ones the earlier are taken."""
    keep_P = torch.zeros_like(score_P, dtype=torch.bool)
    keep_P[score_P.argsort(descending=True, stable=True)[:count]] = True
    return keep_P


def _put(keep_P: Tensor, x_PC: Tensor, number_N: Tensor, centre_G: Tensor, merged_GC: Tensor) -> None:
    """Of some tokens of a frame keep the centres, with these features."""
    keep_P[number_N] = False
    keep_P[number_N[centre_G]] = True
    x_PC[number_N[centre_G]] = merged_GC.to(x_PC.dtype)
