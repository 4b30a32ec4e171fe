"""Base of expert-skipping policies: the rule that says which token-expert assignments are kept."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from aerogel.errors import AerogelError
from aerogel.methods.base import Before, CalibrationSize, CostEstimate, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Rule, Shape, Skipping, shape_of, skipping
from aerogel.runtime.expert_skipping.thresholds import UnreachableError
from aerogel.runtime.policy_state import PolicyState
from aerogel.runtime.token_types import Vocabulary


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertSkippingState(PolicyState):
    """The model that a rule fits, its special tokens, and what the rule costs on the calibration data; methods add what the rule needs."""

    layers: int
    """Layers with routed experts."""
    experts: int
    """Routed experts of a layer."""
    top_k: int
    """Experts that a token is routed to."""
    vision: tuple[int, ...]
    """Token ids of images and video."""
    special: tuple[int, ...]
    """Ids of special tokens."""
    kl: float = math.nan
    """KL divergence from the model with all experts, in nats an answer token; NaN before it is measured."""
    skipped: float = math.nan
    """Share of the token-expert assignments that is dropped."""
    answer_tokens: int = 0
    """Answer tokens that both were measured on."""


SkipState = TypeVar("SkipState", bound=ExpertSkippingState)


@dataclass(frozen=True)
class ExpertSkippingPolicy(RuntimePolicy[SkipState]):
    """Drops some token-expert assignments of an MoE model after the router; what is dropped is not computed."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "experts"})
    attends: ClassVar[bool] = False
    """True where its rule reads what attention each token received."""

    renormalise: bool = field(default=False, kw_only=True)
    """Scale the weights of a token's kept experts to the sum of all."""
    keep_top1: bool = field(default=False, kw_only=True)
    """Keep the best expert of each token, whatever the rule says."""
    protect_special: bool = field(default=True, kw_only=True)
    """Keep all experts of special tokens; they count in the ratio all the same."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Once whole, once to look at scores, a bisection of a hundred thresholds, and once for what it says in the end."""
        return CostEstimate(model_tokens=10.0 * size.tokens)

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the ratio with what its rule can drop at most."""
        ratio, most = getattr(self, "ratio", None), self.most(shape_of(network))
        if ratio is not None and ratio > most + 1e-9:
            yield str(UnreachableError(ratio, most))

    def most(self, shape: Shape) -> float:
        """The share of token-expert assignments that its rule can drop at most, whatever the tokens."""
        return 1 - 1 / shape.top_k if self.keep_top1 else 1.0

    @abstractmethod
    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Measure what the rule needs: the fields that the method adds to the state."""

    @abstractmethod
    def rule(self, state: SkipState) -> Rule:
        """Return the rule of a state."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> SkipState:
        """Fit the rule on the calls and say what it costs there; raises AerogelError without routed experts."""
        shape_of(network)
        return self.calibrated_on(Answers(network, calls, Vocabulary.of(network)))

    def calibrated_on(self, answers: Answers) -> SkipState:
        """Fit the rule where the predictions of the model with all experts are known already."""
        shape, vocabulary = shape_of(answers.network), answers.vocabulary
        made: Any = self.state
        known = {"vision": vocabulary.vision, "special": vocabulary.special}
        state: SkipState = made(**vars(shape), **known, **self.fitted(answers, shape))
        error, ratio = answers.judge(self.skip(self.rule(state), vocabulary), self.attends)
        return replace(state, kl=error, skipped=ratio, answer_tokens=answers.tokens)

    def skip(self, rule: Rule, vocabulary: Vocabulary) -> Skipping:
        """Return what acts between router and experts: a rule with this policy's options."""
        return Skipping(rule, vocabulary, self.renormalise, self.keep_top1, self.protect_special)

    def on(self, network: Network, state: SkipState) -> AbstractContextManager[Any]:
        """Skip by the rule; raises AerogelError when the state is of a network with other layers or experts."""
        ours, theirs = shape_of(network), Shape(state.layers, state.experts, state.top_k)
        if ours != theirs:
            raise AerogelError(
                f"{name_of(self)} was calibrated for {theirs.layers} layers of {theirs.experts} experts, {theirs.top_k} a "
                "token; "
                f"this model has {ours.layers} of {ours.experts}, {ours.top_k} a token: calibrate the policy again"
            )
        return skipping(network, self.skip(self.rule(state), Vocabulary(state.vision, state.special)), self.attends)
