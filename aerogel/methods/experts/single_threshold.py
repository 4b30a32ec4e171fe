"""Single threshold: an expert is dropped where its share of the token over the number of layers is too small; a baseline of MoDES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aerogel.methods.experts.policy import SkipPolicy
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Shape
from aerogel.runtime.expert_skipping.thresholds import keeping, met


@dataclass(frozen=True)
class SingleThreshold(SkipPolicy):
    """Drops experts that weigh less than one threshold, the same in all layers and for all tokens."""

    ratio: float = 0.67
    """Share of all pairs of token and expert to drop, over all layers."""

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Find the threshold that meets the ratio."""
        threshold, _ = met(
            answers,
            lambda tried: self.skip({**vars(shape), "threshold": tried}, answers.vocabulary),
            _score(shape.layers),
            self.ratio,
        )
        return {"threshold": threshold, "ratio": self.ratio}

    def rule(self, state: Mapping[str, Any]) -> Rule:
        """Drop what is below the threshold."""
        return keeping(_score(state["layers"]), state["threshold"])


def _score(layers: int) -> Any:
    def score(routed: Routed) -> Tensor:
        return routed.share_TK / layers

    return score
