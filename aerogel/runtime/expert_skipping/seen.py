"""Tokens that reach the experts of an MoE model while calls pass, and what each expert gives for them.

E experts, T tokens, H hidden width, K experts a token is routed to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.routing import Routed, Skipping, experts_of, shape_of, skipping
from aerogel.runtime.token_types import PADDING, Vocabulary


@dataclass(frozen=True)
class Arrived:
    """Tokens that reached one layer's experts."""

    x_TH: Tensor
    share_TK: Tensor
    index_TK: Tensor


def arrivals(network: Network, calls: Sequence[Call], tokens: int, vocabulary: Vocabulary | None = None) -> list[Arrived]:
    """For each layer, up to so many tokens that reach its experts, from all calls alike; padding never."""
    layers, each = shape_of(network).layers, -(-tokens // max(len(calls), 1))
    kept: list[list[Arrived]] = [[] for _ in range(layers)]

    def watch(routed: Routed) -> Tensor:
        alive = (routed.kind_T != PADDING).nonzero()[:, 0]
        some = alive[torch.linspace(0, len(alive) - 1, min(each, len(alive)), device=alive.device).long()] if len(alive) else alive
        kept[routed.layer].append(Arrived(routed.x_TH[some].clone(), routed.share_TK[some], routed.index_TK[some]))
        return torch.ones_like(routed.index_TK, dtype=torch.bool)

    with skipping(network, Skipping(watch, vocabulary or Vocabulary.of(network))):
        for call in calls:
            network.run(call)
    return [
        Arrived(*(torch.cat([getattr(one, key) for one in layer])[:tokens] for key in ("x_TH", "share_TK", "index_TK"))) for layer in kept
    ]


@torch.no_grad()
def outputs_of_each(network: Network, layer: int, x_TH: Tensor) -> Tensor:
    """Return the outputs of every expert of a layer for the same tokens, y_ETH, unweighted."""
    module = list(experts_of(network).values())[layer]
    one_T1 = torch.ones(len(x_TH), 1, dtype=x_TH.dtype, device=x_TH.device)
    everyone = range(shape_of(network).experts)
    return torch.stack([module(x_TH, torch.full_like(one_T1, number, dtype=torch.int64), one_T1) for number in everyone])
