"""Distance of an MoE model's predictions with skipped experts from those with all experts, where answers are predicted.

T tokens, H hidden width.
"""

from __future__ import annotations

from torch import Tensor

from aerogel.runtime.expert_skipping.counting import counting
from aerogel.runtime.expert_skipping.frontier import Value
from aerogel.runtime.expert_skipping.routing import Skipping, skipping
from aerogel.runtime.expert_skipping.seen import arrivals
from aerogel.runtime.predictions import Predictions, divergence


class Answers(Predictions):
    """The predictions with all experts of the answers in some calls, and what skipping does to them."""

    def judge(self, skip: Skipping, attention: bool = False) -> Value:
        """Return the mean KL(all experts || skipping) in nats an answer token, and the share of dropped assignments; in one pass."""
        with skipping(self.network, skip, attention), counting(self.network, self.vocabulary) as tally:
            error = sum(divergence(*pair) for pair in self.pairs()) / self.tokens
            return Value(error, tally.ratio())

    def walk(self, skip: Skipping, attention: bool = False) -> None:
        """Let a rule see every forward, when what it gives is not asked for."""
        with skipping(self.network, skip, attention):
            for call in self.forwards:
                self.network.run(call)

    def inputs(self, tokens: int) -> list[Tensor]:
        """For each layer, what its experts read of up to so many tokens (T, H)."""
        return [arrived.x_TH for arrived in arrivals(self.network, self.forwards, tokens, self.vocabulary)]
