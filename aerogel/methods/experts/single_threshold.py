"""Single threshold: an expert is dropped where its share of the token over the number of layers is too small; a baseline of MoDES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.options import Share
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Shape
from aerogel.runtime.expert_skipping.thresholds import keeping, met
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class SingleThresholdState(ExpertSkippingState):
    """The threshold."""

    threshold: float
    ratio: float
    """Share of the token-expert assignments that was asked for."""


@dataclass(frozen=True)
class SingleThreshold(ExpertSkippingPolicy[SingleThresholdState]):
    """Drops experts that weigh less than one threshold, the same in all layers and for all tokens."""

    state: ClassVar[type[PolicyState]] = SingleThresholdState

    ratio: Share = 0.67
    """Share of the token-expert assignments to drop, over all layers."""

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Find the threshold that meets the ratio."""
        score = _score(shape.layers)
        threshold, _ = met(answers, lambda tried: self.skip(keeping(score, tried), answers.vocabulary), score, self.ratio)
        return {"threshold": threshold, "ratio": self.ratio}

    def rule(self, state: SingleThresholdState) -> Rule:
        """Drop what is below the threshold."""
        return keeping(_score(state.layers), state.threshold)


def _score(layers: int) -> Any:
    def score(routed: Routed) -> Tensor:
        return routed.share_TK / layers

    return score
