"""Tokens that are merged: bipartite matching of ToMe (arXiv:2210.09461), and windows of a grid that are alike.

I images, S tokens of one, M pairs that are merged, C and D channels, G windows, W tokens of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Tokens that are merged into others."""

    source_IM: Tensor
    target_IM: Tensor


def bipartite(key_ISD: Tensor, count: int, class_token: bool) -> Pairs:
    """Match tokens at even places with those at odd ones, each with the one whose key is most alike, and return the `count` best pairs.

    A class token, at place 0, is never a source, and targets are at odd places; at most half of the other tokens are merged.
    """
    tokens = key_ISD.shape[1]
    unit_ISD = torch.nn.functional.normalize(key_ISD.float(), dim=-1)
    alike_IAB = unit_ISD[:, ::2] @ unit_ISD[:, 1::2].transpose(1, 2)
    if class_token:
        alike_IAB[:, 0] = -torch.inf
    best_IA, other_IA = alike_IAB.max(-1)
    count = min(count, (tokens - int(class_token)) // 2)
    source_IM = best_IA.argsort(dim=1, descending=True, stable=True)[:, :count]
    return Pairs(2 * source_IM, 2 * other_IA.gather(1, source_IM) + 1)


def merged(x_ISC: Tensor, size_IS: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Merge sources into their targets, a mean weighted by how many patches each token stands for.

    Returns tokens and sizes of all places, in which those of sources mean nothing any more, and a mask of the places that stay.
    """
    weighted_ISC = x_ISC.float() * size_IS[..., None]
    into_IMC = pairs.target_IM[..., None].expand(-1, -1, x_ISC.shape[-1])
    total_ISC = weighted_ISC.scatter_add(1, into_IMC, weighted_ISC.gather(1, pairs.source_IM[..., None].expand_as(into_IMC)))
    sum_IS = size_IS.scatter_add(1, pairs.target_IM, size_IS.gather(1, pairs.source_IM))
    stays_IS = torch.ones_like(size_IS, dtype=torch.bool).scatter_(1, pairs.source_IM, False)
    return (total_ISC / sum_IS[..., None]).to(x_ISC.dtype), sum_IS, stays_IS


def windows(side: int, width: int) -> Tensor:
    """Return the places (G, W) of the tokens of each square window of a square grid."""
    place = torch.arange(side * side).reshape(side // width, width, side // width, width)
    return place.permute(0, 2, 1, 3).reshape(-1, width * width)


def likeness(x_PC: Tensor, place_GW: Tensor) -> Tensor:
    """Return the mean cosine of each window's pairs of tokens (G)."""
    unit_GWC = torch.nn.functional.normalize(x_PC.float(), dim=-1)[place_GW]
    pairs = place_GW.shape[1] * (place_GW.shape[1] - 1)
    return (unit_GWC.sum(1).square().sum(-1) - unit_GWC.square().sum((1, 2))) / pairs
