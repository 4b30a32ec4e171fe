"""DiEP's skipping as we read it (arXiv:2509.16105): NAEE's rule, readier where the experts are alike.

The paper's formula was not to be confirmed; ours scales beta by how alike an expert's outputs are to those of the token's best expert.

E experts, L layers, T tokens, K experts a token is routed to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.options import Share, Tokens
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Shape
from aerogel.runtime.expert_skipping.seen import outputs_of_each
from aerogel.runtime.expert_skipping.thresholds import keeping, met, seen, tail_over_head
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class DiepState(ExpertSkippingState):
    """Similarity of the experts, and the threshold."""

    alike: Tensor
    """Linear CKA (L, E, E) of the outputs of the experts of a layer."""
    beta: float


@dataclass(frozen=True)
class Diep(ExpertSkippingPolicy[DiepState]):
    """Drops experts that weigh less than beta times their likeness to the best one times what stands before them."""

    state: ClassVar[type[PolicyState]] = DiepState

    ratio: Share | None = None
    """Share of the token-expert assignments to drop: beta is scaled until it is met. None leaves the median of the calibration tokens."""
    tokens: Tokens = 256
    """Tokens of each layer on which the outputs of all experts are compared."""
    renormalise: bool = field(default=True, kw_only=True)
    """Scale the weights of a token's kept experts to the sum of all."""

    def most(self, shape: Shape) -> float:
        """All but the best expert of each token."""
        return 1 - 1 / shape.top_k

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Likeness of all experts, then beta."""
        inputs = answers.inputs(self.tokens)
        alike = [likeness(outputs_of_each(answers.network, layer, x_TH)) for layer, x_TH in enumerate(inputs)]
        alike_LEE = torch.stack(alike)
        score = _score(alike_LEE)
        values = seen(answers, score)
        beta = float(values.median()) if len(values) else 1.0
        if self.ratio is not None:
            beta, _ = met(answers, lambda tried: self.skip(keeping(score, tried), answers.vocabulary), score, self.ratio)
        return {"alike": alike_LEE, "beta": beta}

    def rule(self, state: DiepState) -> Rule:
        """Drop what weighs too little, or says too much the same."""
        return keeping(_score(state.alike), state.beta)


def likeness(y_ETH: Tensor) -> Tensor:
    """Linear CKA (E, E) of what the experts give for the same tokens, from 0 to 1."""
    y_ETH = y_ETH.float() - y_ETH.float().mean(1, keepdim=True)
    gram_ED = torch.nn.functional.normalize((y_ETH @ y_ETH.transpose(1, 2)).flatten(1), dim=1)
    return (gram_ED @ gram_ED.T).clamp(0, 1)


def _score(alike_LEE: Tensor) -> Any:
    def score(routed: Routed) -> Tensor:
        best_T1 = routed.index_TK.gather(1, routed.share_TK.argmax(-1, keepdim=True))
        alike_TK = alike_LEE[routed.layer].to(routed.share_TK.device)[best_T1, routed.index_TK]
        return tail_over_head(routed.share_TK) / alike_TK.clamp(min=torch.finfo(torch.float32).tiny)

    return score
