"""DART: image tokens stay that are least like a few pivots, so that what stays repeats itself little (arXiv:2502.11494).

B rows, H heads, K positions before a block, S keys, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aerogel.methods.tokens.policy import Budget, TokenPolicy, within_budget
from aerogel.options import Count, CountOrZero
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Dart(TokenPolicy):
    """Takes pivots by the size (L1) of their keys in the block before, and for each of them the image tokens least like it, by cosine.

    Pivots come in a fixed order: of the image, then of the text behind it, each from the largest key on. Each takes as many tokens; what
    the division leaves over is not used unless `exact` says so: of 576 tokens, budgets of 192, 128 and 64 keep 188, 124 and 60.
    """

    keep: Budget = 0.5
    """Image tokens of a row that stay at most, pivots among them: a number, or a share."""
    layer: Count = 5
    """Number of the first block without the others; keys are those of the block before."""
    image_pivots: Count = 4
    """Pivots among the image tokens, which stay."""
    text_pivots: CountOrZero = 4
    """Pivots among the tokens behind the image."""
    exact: bool = False
    """Let the first pivots take one token more each, so that the budget is used up."""

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the block before."""
        return (self.layer - 1,)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {self.layer: self.choose}

    def choose(self, stage: Stage) -> Selection | None:
        """Choose row by row."""
        if (count_B := within_budget(stage, self.keep)) is None:
            return None
        key_BHKD = stage.watched[self.layer - 1].key_BHSD[:, :, -stage.kind_BK.shape[1] :]
        size_BK = key_BHKD.float().abs().sum((1, 3))
        state_BKC = stage.final_norm(stage.hidden_BKC)
        text_BK = stage.prompt_BK & ~stage.vision_BK & ~stage.kept.rows(stage.separator_BN) & (stage.vision_BK.cumsum(1) > 0)
        keep_BK = ~stage.vision_BK
        for row, count in enumerate(count_B.tolist()):
            keep_BK[row] |= self.chosen(state_BKC[row], size_BK[row], stage.vision_BK[row], text_BK[row], count)
        return Selection(keep_BK)

    def chosen(self, state_KC: Tensor, size_K: Tensor, vision_K: Tensor, text_K: Tensor, count: int) -> Tensor:
        """Return a mask of the image tokens of a row that stay."""
        if count >= int(vision_K.sum()):
            return vision_K
        pivots = largest(size_K, vision_K, min(self.image_pivots, count))
        keep_K = torch.zeros_like(vision_K)
        keep_K[pivots] = True
        number_P = torch.cat([pivots, largest(size_K, text_K, self.text_pivots)])
        unit_KC = normalize(state_KC.float(), dim=-1)
        each, over = divmod(count - len(pivots), max(1, len(number_P)))  # no pivot where nothing stays
        for place, pivot in enumerate(number_P.tolist()):
            left_L = (vision_K & ~keep_K).nonzero()[:, 0]
            order_L = (unit_KC[left_L] @ unit_KC[pivot]).argsort(stable=True)
            keep_K[left_L[order_L[: each + (self.exact and place < over)]]] = True
        return keep_K


def largest(size_K: Tensor, candidate_K: Tensor, count: int) -> Tensor:
    """Return the numbers of the candidates with the largest sizes, from the largest on; of equal ones the earlier comes first."""
    number_N = candidate_K.nonzero()[:, 0]
    return number_N[size_K[number_N].argsort(descending=True, stable=True)[:count]]
