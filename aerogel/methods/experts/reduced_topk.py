"""Lower k: every token keeps its best few experts, in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import AerogelError, reasons
from aerogel.methods.base import Before
from aerogel.methods.experts.policy import ExpertSkippingPolicy, ExpertSkippingState
from aerogel.model.network import Network
from aerogel.options import CountOrZero, Share
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Shape, shape_of
from aerogel.runtime.expert_skipping.thresholds import UnreachableError
from aerogel.runtime.policy_state import PolicyState


@dataclass(frozen=True, eq=False, kw_only=True)
class ReducedTopkState(ExpertSkippingState):
    """The number of kept experts."""

    k: int
    """Experts that each token keeps."""


@dataclass(frozen=True)
class ReducedTopk(ExpertSkippingPolicy[ReducedTopkState]):
    """Keeps the best `k` experts of each token; give `k`, or the ratio that it has to drop at least."""

    state: ClassVar[type[PolicyState]] = ReducedTopkState

    k: CountOrZero | None = None
    """Experts that are left to each token."""
    ratio: Share | None = None
    """Share of a token's experts to drop, at least; what is left is rounded down."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.k is None) == (self.ratio is None):
            raise AerogelError("reduced_topk needs one of k and ratio")

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Count what is left."""
        yield from reasons(lambda: self._kept(shape_of(network)))

    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Count; raises AerogelError for numbers that the router does not have, and a ratio that leaves no expert."""
        return {"k": self._kept(shape)}

    def _kept(self, shape: Shape) -> int:
        kept = self.k if self.k is not None else int(shape.top_k * (1 - (self.ratio or 0.0)) + 1e-9)
        if self.ratio is not None and kept == 0:
            raise UnreachableError(self.ratio, 1 - 1 / shape.top_k)
        if kept > shape.top_k:
            raise AerogelError(f"k {kept}: this router chooses {shape.top_k} experts, so 0 to {shape.top_k} can be left")
        return kept

    def rule(self, state: ReducedTopkState) -> Rule:
        """Keep the best."""

        def rule(routed: Routed) -> Tensor:
            best_TK = routed.share_TK.topk(state.k, dim=-1).indices
            return torch.zeros_like(routed.index_TK, dtype=torch.bool).scatter_(1, best_TK, True)

        return rule
