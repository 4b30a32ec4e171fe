"""DivPrune: the image tokens that stay are as unlike each other as they can be (arXiv:2503.02175)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aerogel.methods.tokens.policy import Budget, TokenPolicy, within_budget
from aerogel.numerics.token_selection import farthest_first
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Divprune(TokenPolicy):
    """Chooses image tokens before the first block, greedily: always the one that is least like those chosen so far, by cosine."""

    keep: Budget = 0.5
    """Image tokens of a row that stay: a number, or a share."""

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {0: self.choose}

    def choose(self, stage: Stage) -> Selection | None:
        """Choose row by row."""
        if (count_B := within_budget(stage, self.keep)) is None:
            return None
        keep_BK = ~stage.vision_BK
        for row, count in enumerate(count_B.tolist()):
            place_V = stage.vision_BK[row].nonzero()[:, 0]
            if count and len(place_V):
                keep_BK[row, place_V[farthest_first(stage.hidden_BKC[row, place_V], count)]] = True
        return Selection(keep_BK)
