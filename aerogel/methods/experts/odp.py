"""MC-MoE's online pruning: NAEE's rule, but what matters most keeps all experts and what matters least has none (arXiv:2410.06270).

B rows, S positions, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.options import CountOrZero, NonNegative, Share
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Shape
from aerogel.runtime.expert_skipping.thresholds import met, tail_over_head
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.token_types import PADDING


@dataclass(frozen=True, eq=False, kw_only=True)
class OdpState(ExpertSkippingState):
    """The threshold."""

    beta: float
    ratio: float | None = None
    """Share of the token-expert assignments that was asked for; None where beta was given."""


@dataclass(frozen=True)
class Odp(ExpertSkippingPolicy[OdpState]):
    """Drops experts that weigh less than beta times those before; in a prompt, by what attention a token receives, all or none of them."""

    state: ClassVar[type[PolicyState]] = OdpState

    attends: ClassVar[bool] = True

    ratio: Share | None = None
    """Share of the token-expert assignments to drop: beta is chosen for it. None leaves `beta`."""
    beta: NonNegative = 0.5
    """Largest weight of the last experts, relative to those before them, at which they are dropped; the authors' value."""
    kept: Share = 0.1
    """Share of a prompt's tokens that keep all experts: the most important ones."""
    dropped: Share = 0.1
    """Share of a prompt's tokens of which all assignments are dropped: the least important ones."""
    layers: CountOrZero = 20
    """First layers in which tokens are told apart so."""
    as_published: bool = False
    """Sum attention over the wrong side, as the public code does: each token then counts one over those that see it."""
    renormalise: bool = field(default=True, kw_only=True)
    """Scale the weights of a token's kept experts to the sum of all; the authors do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept + self.dropped > 1:
            raise AerogelError(
                f"options 'kept' and 'dropped': expected shares of tokens, together <= 1, got {self.kept} and {self.dropped}"
            )

    def most(self, shape: Shape) -> float:
        """All but the best expert of each token; of layers in which tokens lose all, everything, as a short prompt may round `lost` up."""
        rest = 0.0 if self.keep_top1 or not self.dropped else min(self.layers, shape.layers) / shape.layers
        return 1 - (1 - rest) / shape.top_k

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Find beta where a ratio is asked for."""
        if self.ratio is None:
            return {"beta": self.beta}
        beta, _ = met(answers, lambda tried: self.skip(self.below(tried), answers.vocabulary), _score, self.ratio, attention=True)
        return {"beta": beta, "ratio": self.ratio}

    def rule(self, state: OdpState) -> Rule:
        """Return NAEE's rule with the tokens told apart by their importance."""
        return self.below(state.beta)

    def below(self, beta: float) -> Rule:
        """Return the rule for one threshold."""

        def rule(routed: Routed) -> Tensor:
            kept_TK = _score(routed) >= beta
            if routed.received_BS is None or routed.layer >= self.layers:
                return kept_TK
            order_T = _order(routed, self.as_published).reshape(-1, 1)
            return (kept_TK & (order_T >= self.dropped)) | (order_T >= 1 - self.kept)

        return rule


def _score(routed: Routed) -> Tensor:
    return tail_over_head(routed.share_TK)


def importance(norm_BS: Tensor, received_BS: Tensor, alive_BS: Tensor, as_published: bool) -> Tensor:
    """Return L1 norm times attention received, over the number of positions that can see each (BS); padding gives minus infinity."""
    seen_by_BS = alive_BS.long().flip(1).cumsum(1).flip(1).clamp(min=1)
    received_BS = torch.ones_like(received_BS) if as_published else received_BS
    return (norm_BS * received_BS / seen_by_BS).masked_fill(~alive_BS, -torch.inf)


def _order(routed: Routed, as_published: bool) -> Tensor:
    """Return each token's rank in its row by importance, from 0 (least) to below 1; padding is not counted."""
    assert routed.received_BS is not None
    alive_BS = routed.kind_BS != PADDING
    norm_BS = routed.x_TH.float().abs().sum(-1).view_as(routed.kind_BS)
    rank_BS = importance(norm_BS, routed.received_BS, alive_BS, as_published).argsort(dim=1, stable=True).argsort(dim=1)
    padded_B1 = (~alive_BS).sum(1, keepdim=True)
    return (rank_BS - padded_B1) / alive_BS.sum(1, keepdim=True).clamp(min=1)
