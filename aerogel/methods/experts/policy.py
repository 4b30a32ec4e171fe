"""What expert-skipping policies share: the rule that says which token-expert assignments are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from aerogel.errors import AerogelError
from aerogel.methods.base import CalibrationSize, CostEstimate, Requirement, RuntimePolicy, name_of
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.routing import Rule, Shape, Skipping, shape_of, skipping
from aerogel.runtime.token_types import Vocabulary


@dataclass(frozen=True)
class SkipPolicy(RuntimePolicy[dict[str, Any]]):
    """Lets tokens of a mixture do without some of the experts they were routed to; what is dropped is not computed."""

    requires: ClassVar[frozenset[Requirement]] = frozenset({"calls", "experts"})
    attends: ClassVar[bool] = False
    """Whether its rule asks what attention each token received."""

    renormalise: bool = field(default=False, kw_only=True)
    """Whether the weights of the experts that are left are raised to what all weighed together."""
    keep_top1: bool = field(default=False, kw_only=True)
    """Whether a token keeps its best expert whatever the rule says."""
    protect_special: bool = field(default=True, kw_only=True)
    """Whether marks of a chat keep all experts; they count in the ratio all the same."""

    def cost(self, size: CalibrationSize) -> CostEstimate:
        """Once whole, once to look at scores, a bisection of a hundred thresholds, and once for what it says in the end."""
        return CostEstimate(model_tokens=10.0 * size.tokens)

    @abstractmethod
    def fitted(self, answers: Answers, shape: Shape) -> dict[str, Any]:
        """Measure what the rule needs."""

    @abstractmethod
    def rule(self, state: Mapping[str, Any]) -> Rule:
        """The rule that a state stands for."""

    def calibrate(self, network: Network, calls: Sequence[Call]) -> dict[str, Any]:
        """Fit the rule on the calls and say what it costs there; raises AerogelError without routed experts."""
        shape_of(network)
        return self.calibrated_on(Answers(network, calls, Vocabulary.of(network)))

    def calibrated_on(self, answers: Answers) -> dict[str, Any]:
        """The same where the whole network's predictions are there already."""
        shape, vocabulary = shape_of(answers.network), answers.vocabulary
        state = {**vars(shape), "vision": list(vocabulary.vision), "special": list(vocabulary.special)}
        state |= self.fitted(answers, shape)
        error, ratio = answers.judge(self.skip(state, vocabulary), self.attends)
        return state | {"kl": error, "skipped": ratio, "answer_tokens": answers.tokens}

    def skip(self, state: Mapping[str, Any], vocabulary: Vocabulary) -> Skipping:
        """The rule of a state with this policy's switches."""
        return Skipping(self.rule(state), vocabulary, self.renormalise, self.keep_top1, self.protect_special)

    def on(self, network: Network, state: dict[str, Any]) -> AbstractContextManager[Any]:
        """Skip by the rule; raises AerogelError when the state is of a network with other layers or experts."""
        ours, theirs = shape_of(network), Shape(*(state[key.name] for key in fields(Shape)))
        if ours != theirs:
            raise AerogelError(
                f"{name_of(self)} was calibrated for {theirs.layers} layers of {theirs.experts} experts, {theirs.top_k} a "
                "token; "
                f"this network has {ours.layers} of {ours.experts}, {ours.top_k} a token: calibrate it anew"
            )
        vocabulary = Vocabulary(tuple(state["vision"]), tuple(state["special"]))
        return skipping(network, self.skip(state, vocabulary), self.attends)
