"""Thresholds for rules that score each token-expert assignment and drop those with a low score.

T tokens, K experts a token is routed to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aerogel.errors import AerogelError
from aerogel.runtime.expert_skipping.answers import Answers
from aerogel.runtime.expert_skipping.frontier import Evaluations, Found, crossing
from aerogel.runtime.expert_skipping.routing import Routed, Rule, Skipping
from aerogel.runtime.token_types import PADDING, SPECIAL

Score = Callable[[Routed], Tensor]
"""score_TK; infinite where an assignment is never dropped."""
POINTS = 100


def keeping(score: Score, threshold: float) -> Rule:
    """The rule that drops what scores less than a threshold."""
    return lambda routed: score(routed) >= threshold


def seen(answers: Answers, score: Score, kinds: Sequence[int] | None = None, attention: bool = False) -> Tensor:
    """All finite scores while nothing is dropped, ascending: of tokens of some kinds, or of all but padding and special tokens."""
    found: list[Tensor] = []

    def watch(routed: Routed) -> Tensor:
        kind_T = routed.kind_T
        own_T = (
            (kind_T != PADDING) & (kind_T != SPECIAL) if kinds is None else torch.isin(kind_T, torch.tensor(kinds, device=kind_T.device))
        )
        found.append(score(routed)[own_T].flatten().cpu())
        return torch.ones_like(routed.index_TK, dtype=torch.bool)

    answers.walk(Skipping(watch, answers.vocabulary), attention)
    values = torch.cat(found)
    return values[values.isfinite()].sort().values


def grid(sorted_: Tensor, points: int = POINTS) -> list[float]:
    """So many thresholds that split scores evenly: the first drops nothing, the last drops all; equal ones stand once."""
    if points < 2:
        raise AerogelError(f"a grid of {points} thresholds; at least 2 are expected")
    if not len(sorted_):
        return [0.0]
    places = torch.linspace(0, len(sorted_) - 1, points - 1).round().long()
    above = torch.nextafter(sorted_[-1:], torch.tensor([torch.inf]))
    return torch.cat([torch.zeros(1), sorted_[places][1:], above]).unique().tolist()


def met(answers: Answers, skip: Callable[[float], Skipping], score: Score, ratio: float, attention: bool = False) -> tuple[float, Found]:
    """Return the smallest threshold of a grid whose rule drops at least `ratio` of all assignments, and what it gives there.

    Raises AerogelError that says how much can be dropped at most.
    """
    values = grid(seen(answers, score, attention=attention))
    evaluations = Evaluations(lambda cell: answers.judge(skip(values[cell[0]]), attention))
    found = crossing(evaluations, len(values), ratio)
    if found is None:
        raise UnreachableError(ratio, evaluations((len(values) - 1, 0)).ratio)
    return values[found.cell[0]], found


class UnreachableError(AerogelError):
    """No setting of a rule drops enough."""

    def __init__(self, ratio: float, most: float) -> None:
        super().__init__(f"ratio {ratio} cannot be reached: this rule drops {most:.3f} of all assignments at most; ask for less")
        self.most = most
        """The share of assignments that can be dropped."""


def tail_over_head(share_TK: Tensor) -> Tensor:
    """Return the weight of an expert and all behind it, divided by that of those before it; infinite for the best expert of each token.

    Ranks are by weight; the result is in the order of the assignments.
    """
    sorted_TK, order_TK = share_TK.sort(dim=-1, descending=True)
    head_TK = sorted_TK.cumsum(-1) - sorted_TK
    tail_TK = sorted_TK.flip(-1).cumsum(-1).flip(-1)
    ratio_TK = (tail_TK / head_TK.clamp(min=torch.finfo(torch.float32).tiny)).index_fill(
        -1, torch.tensor([0], device=share_TK.device), torch.inf
    )
    return torch.empty_like(ratio_TK).scatter_(-1, order_TK, ratio_TK)
