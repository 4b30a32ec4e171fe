"""NAEE's dynamic skipping: the last experts go where they weigh little beside those before them (arXiv:2402.14800).

L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.options import Share
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Shape
from aerogel.runtime.expert_skipping.thresholds import keeping, met, seen, tail_over_head
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class NaeeState(ExpertSkippingState):
    """Thresholds of the layers."""

    beta: Tensor
    """Median (L) of the last expert's weight over that of the experts before it."""
    scale: float
    """Factor of all medians that meets the ratio."""


@dataclass(frozen=True)
class Naee(ExpertSkippingPolicy[NaeeState]):
    """Drops the experts from rank i on where together they weigh less than beta times those before; beta is the layer's median of that.

    With two experts a token this is the published rule: the second goes where it weighs less than beta times the first.
    """

    state: ClassVar[type[PolicyState]] = NaeeState

    ratio: Share | None = None
    """Share of the token-expert assignments to drop: all betas are scaled alike until it is met. None leaves the medians as they are."""
    renormalise: bool = field(default=True, kw_only=True)
    """Scale the weights of a token's kept experts to the sum of all; the authors do."""

    def most(self, shape: Shape) -> float:
        """All but the best expert of each token."""
        return 1 - 1 / shape.top_k

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Medians of the calibration tokens, then the scale that meets the ratio."""
        betas = [_median(seen(answers, _of_layer(layer))) for layer in range(shape.layers)]
        beta_L, scale = torch.tensor(betas, dtype=torch.float64), 1.0
        if self.ratio is not None:
            score = _score(beta_L)
            scale, _ = met(answers, lambda tried: self.skip(keeping(score, tried), answers.vocabulary), score, self.ratio)
        return {"beta": beta_L, "scale": scale}

    def rule(self, state: NaeeState) -> Rule:
        """Drop what weighs too little beside the better ones."""
        return keeping(_score(state.beta), state.scale)


def _score(beta_L: Tensor) -> Any:
    betas = beta_L.tolist()

    def score(routed: Routed) -> Tensor:
        return tail_over_head(routed.share_TK) / betas[routed.layer]

    return score


def _of_layer(layer: int) -> Any:
    """The last expert's weight beside all before it, of one layer's tokens; infinite elsewhere."""

    def score(routed: Routed) -> Tensor:
        smallest_T1 = tail_over_head(routed.share_TK).amin(-1, keepdim=True)
        return smallest_T1 if routed.layer == layer else torch.full_like(smallest_T1, torch.inf)

    return score


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else 1.0
