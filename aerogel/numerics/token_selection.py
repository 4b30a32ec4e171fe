"""Choice of tokens by scores, by distance and by density; everything is deterministic, and of equal scores the earlier token wins.

B rows, N tokens, C channels, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def best(score_BN: Tensor, candidate_BN: Tensor, count_B: Tensor) -> Tensor:
    """Return a mask of the `count_B` candidates of each row with the highest scores, all of them where there are fewer."""
    score_BN = score_BN.float().masked_fill(~candidate_BN, -torch.inf)
    order_BN = score_BN.argsort(dim=1, descending=True, stable=True)
    rank_BN = torch.empty_like(order_BN).scatter_(1, order_BN, torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN))
    return (rank_BN < count_B[:, None]) & candidate_BN


def farthest_first(x_NC: Tensor, count: int) -> Tensor:
    """Return the numbers of `count` tokens, ascending, chosen by the greedy max-min rule of DivPrune (arXiv:2503.02175) on 1 - cosine.

    The first is the one whose nearest neighbour is farthest; then always the one whose nearest chosen token is farthest.
    """
    unit_NC = torch.nn.functional.normalize(x_NC.float(), dim=-1)
    distance_NN = 1 - unit_NC @ unit_NC.T
    tokens = len(x_NC)
    if count >= tokens:
        return torch.arange(tokens, device=x_NC.device)
    nearest_N = distance_NN.masked_fill(torch.eye(tokens, dtype=torch.bool, device=x_NC.device), torch.inf).amin(1)
    chosen = [int(nearest_N.argmax())]
    away_N = distance_NN[chosen[0]].clone()
    for _ in range(count - 1):
        away_N[chosen[-1]] = -torch.inf
        chosen.append(int(away_N.argmax()))
        away_N = torch.minimum(away_N, distance_NN[chosen[-1]])
    return torch.tensor(sorted(chosen), device=x_NC.device)


class Clusters(NamedTuple):
    """Groups of tokens."""

    centre_G: Tensor
    """Numbers of the tokens at the centres, by falling density times distance."""
    group_N: Tensor
    """The group of each token."""


def density_peaks(x_NC: Tensor, clusters: int, neighbours: int) -> Clusters:
    """Cluster tokens by density peaks of their nearest neighbours (DPC-KNN), without the noise that published code adds to densities.

    Distances are Euclidean over the root of C; density is exp(-mean of the squares of the smallest `neighbours` distances); centres have
    the highest product of density and distance to the nearest denser token.
    """
    tokens, channels = x_NC.shape
    distance_NN = torch.cdist(x_NC.float()[None], x_NC.float()[None])[0] / channels**0.5
    neighbours = min(neighbours, tokens)
    density_N = (-distance_NN.topk(neighbours, dim=1, largest=False).values.square().mean(1)).exp()
    number_N = torch.arange(tokens, device=x_NC.device)
    denser_NN = (density_N[None] > density_N[:, None]) | ((density_N[None] == density_N[:, None]) & (number_N[None] < number_N[:, None]))
    to_denser_N = distance_NN.masked_fill(~denser_NN, torch.inf).amin(1)
    to_denser_N = torch.where(to_denser_N.isinf(), distance_NN.max(), to_denser_N)
    centre_G = (density_N * to_denser_N).argsort(descending=True, stable=True)[:clusters]
    group_N = distance_NN[:, centre_G].argmin(1)
    group_N[centre_G] = torch.arange(len(centre_G), device=x_NC.device)
    return Clusters(centre_G, group_N)


def means(x_NC: Tensor, group_N: Tensor, groups: int, weight_N: Tensor | None = None) -> Tensor:
    """Return the mean of each group of tokens (G, C), weighted where weights are given; groups without a token are zero."""
    weight_N = torch.ones(len(x_NC), device=x_NC.device) if weight_N is None else weight_N.float()
    total_GC = torch.zeros(groups, x_NC.shape[1], device=x_NC.device).index_add_(0, group_N, x_NC.float() * weight_N[:, None])
    weight_G = torch.zeros(groups, device=x_NC.device).index_add_(0, group_N, weight_N)
    return (total_GC / weight_G.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).to(x_NC.dtype)
