"""A bound for rules that drop image tokens: keep those without which the answers move most, which only who has seen the answers can know.

Each token, or each group of neighbours, is left out alone, and the KL divergence at the answers is its worth. Tokens that stand for each
other are worth little one by one; with several rounds what stays is judged anew each time.

B rows, N positions of a forward, A tokens of answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.methods.tokens.policy import Budget, TokenPolicy, TokenState, counts
from aerogel.model.calls import Call
from aerogel.model.network import Network
from aerogel.numerics.metrics import kl_divergence
from aerogel.numerics.token_selection import best
from aerogel.options import Count
from aerogel.runtime.predictions import logits_at, predicted
from aerogel.runtime.token_types import TEXT, Vocabulary
from aerogel.runtime.tokens.decoder import decoder_of
from aerogel.runtime.tokens.shortening import Rule, Selection, Shortening, Stage


@dataclass(frozen=True)
class AnswerOracle(TokenPolicy):
    """Keeps image tokens by what the answers lose without them, before the first block; acts on the calls that it was calibrated on."""

    keep: Budget = 0.5
    """Image tokens of a row that stay: a number, or a share."""
    group: Count = 1
    """Neighbouring tokens that are left out together: a forward for each group and round."""
    rounds: Count = 1
    """Rounds in which tokens go, as many in each."""
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)
    """Token ids of each call, and which of its positions stay."""

    def fitted(self, network: Network, calls: Sequence[Call]) -> TokenState:
        """Judge the tokens of every call."""
        self.found[:] = [(call.kwargs["input_ids"], kept(network, call, self.keep, self.group, self.rounds)) for call in calls]
        return super().fitted(network, calls)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {0: self.choose}

    def choose(self, stage: Stage) -> Selection:
        """Look up what was found; raises AerogelError for another call."""
        keep_BN = next((keep_BN for ids_BN, keep_BN in self.found if ids_BN is stage.inputs["input_ids"]), None)
        if keep_BN is None:
            raise AerogelError("the oracle has not seen the answers of these prompts; calibrate it on them")
        return Selection(keep_BN)


@torch.no_grad()
def kept(network: Network, call: Call, budget: float, group: int = 1, rounds: int = 1) -> Tensor:
    """Return the positions of a call that stay (B, N): text, and the image tokens without which the answers move most."""
    judge = _Judge(network, call)
    left_BN, total_B = judge.image_BN, judge.image_BN.sum(1)
    going_B = total_B - counts(budget, total_B)
    for number in range(1, rounds + 1):
        if bool((left_BN.sum(1) > total_B - going_B * number // rounds).any()):
            left_BN = best(judge.worth(left_BN, group), left_BN, total_B - going_B * number // rounds)
    return left_BN | ~judge.image_BN


class _Judge:
    """The logits of a call at its answers with all tokens, and how far they move without some."""

    def __init__(self, network: Network, call: Call) -> None:
        self._network, self._call, vocabulary = network, call, Vocabulary.of(network)
        self._at_BN = predicted(call, vocabulary) & (vocabulary.kinds(call.kwargs) == TEXT)
        self._row_A = self._at_BN.nonzero()[:, 0]
        stages: list[Stage] = []
        self._whole_AV = self._logits(stages.append)  # type: ignore[arg-type]
        self.image_BN = stages[0].vision_BK

    def worth(self, left_BN: Tensor, group: int) -> Tensor:
        """Return how far the answers of a row move, in nats a token, where each group of those left goes too."""
        group_BN = torch.where(left_BN, (left_BN.cumsum(1) - 1) // group, -1)
        worth_BN = torch.zeros(left_BN.shape, device=left_BN.device)
        for number in range(int(group_BN.max()) + 1):
            without_BN = group_BN == number
            keep_BN = (left_BN & ~without_BN) | ~self.image_BN
            moved_B = self._moved(self._logits(lambda _, keep_BN=keep_BN: Selection(keep_BN)))
            worth_BN = torch.where(without_BN, moved_B[:, None], worth_BN)
        return worth_BN

    def _logits(self, rule: Rule) -> Tensor:
        with Shortening(self._network, decoder_of(self._network), {0: rule}).on():
            return logits_at(self._network, self._call, self._at_BN)

    def _moved(self, other_AV: Tensor) -> Tensor:
        """The divergence of each row; none where a row has no answer."""
        rows = [self._row_A == row for row in range(len(self._at_BN))]
        moved = [kl_divergence(self._whole_AV[of_A], other_AV[of_A]) if bool(of_A.any()) else 0.0 for of_A in rows]
        return torch.tensor(moved, device=other_AV.device)
