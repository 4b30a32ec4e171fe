"""FastV: behind an early block only the image tokens stay that the last token of the prompt attends to most (arXiv:2403.06764)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aerogel.methods.tokens.policy import Budget, TokenPolicy, keeping_best, last_token
from aerogel.options import Count
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Fastv(TokenPolicy):
    """Ranks image tokens by the attention, a mean over heads, of the prompt's last token in the block before."""

    keep: Budget = 0.5
    """Image tokens of a row that stay: a number, or a share."""
    layer: Count = 3
    """Number of the first block without the others; the one before it is asked. Published: 2 with half of the tokens."""

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the block before."""
        return (self.layer - 1,)

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return the rule."""
        return {self.layer: self.choose}

    def choose(self, stage: Stage) -> Selection | None:
        """Keep what is attended to most."""
        probability_BHRS = stage.watched[self.layer - 1].attention(last_token(stage))
        return keeping_best(stage, probability_BHRS.mean(1)[:, 0, -stage.kind_BK.shape[1] :], self.keep)
