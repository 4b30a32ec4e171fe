"""HoliTom: static tokens of a clip become means over the best windows, and half of what is left goes inside the decoder (arXiv:2505.21334).

B rows, K positions before a block, F frames, P places of a frame, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.methods.tokens.policy import counts, last_token
from aerogel.methods.video_tokens.policy import CLIPS, ClipPolicy
from aerogel.numerics.token_selection import best
from aerogel.numerics.video_tokens import Holitom as Settings
from aerogel.numerics.video_tokens import Reduced, fold, holitom
from aerogel.options import Count, CountOrZero, Share
from aerogel.runtime.tokens.clips import ClipAttention
from aerogel.runtime.tokens.stage import Rule, Selection, Stage


@dataclass(frozen=True)
class Holitom(ClipPolicy):
    """Cuts clips into the windows in which most tokens repeat, merges those, keeps others by attention, and folds half of them later.

    Attention before the first block is what a token receives in the vision tower, inside the decoder that of the prompt's last token.
    """

    keep: Share = 0.2
    """Share of a clip's tokens that stays before the first block; 1: all, and static tokens are not merged."""
    threshold: Share = 0.65
    """Cosine to the same place in the next frame above which a token is static."""
    clustered: Share = 0.0
    """Share of the tokens that stay of a frame which are clusters of the remaining ones; 1: attention in the vision tower is not read."""
    centre: Share = 0.6
    """Weight of the token at a cluster's centre against the mean of the others."""
    longest: Count = 128
    """Most frames of a window."""
    neighbours: Count = 7
    """Neighbours by which density is measured."""
    layer: CountOrZero = 18
    """Number of the block before which the second stage acts, by the attention of the block before; 0: there is none."""
    inner_keep: Share = 0.5
    """Share of a clip's tokens, of those that are left, that stays behind the second stage."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return equal shares for both stages."""
        return {"keep": round(share**0.5, 4), "inner_keep": round(share**0.5, 4)}

    @property
    def reads_attention(self) -> bool:
        """True where attention says which tokens stay."""
        return self.clustered < 1

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the block before the second stage."""
        return (self.layer - 1,) if self.layer else ()

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return both stages."""
        return {**super().rules(depth), **({self.layer: self.fold} if self.layer else {})}

    def reduce(self, x_FPC: Tensor, attention: ClipAttention | None) -> Reduced:
        """First stage: merge and choose."""
        settings = Settings(self.keep, self.threshold, self.clustered, self.centre, self.longest, self.neighbours)
        return holitom(x_FPC, None if attention is None else attention.received_FP, settings)

    def fold(self, stage: Stage) -> Selection | None:
        """Second stage: keep what the last token attends to most, and fold each other token into the one that is most like it."""
        clip_BK = stage.kept.rows(stage.memory[CLIPS]) & stage.real_BK
        count_B = counts(self.inner_keep, clip_BK.sum(1))
        if bool((count_B >= clip_BK.sum(1)).all()):
            return None
        probability_BHRS = stage.watched[self.layer - 1].attention(last_token(stage))
        keep_BK = best(probability_BHRS.mean(1)[:, 0, -clip_BK.shape[1] :], clip_BK, count_B) | ~clip_BK
        hidden_BKC = stage.hidden_BKC.clone()
        for row, count in enumerate(count_B.tolist()):
            if count:
                clip_K = clip_BK[row].nonzero()[:, 0]
                hidden_BKC[row, clip_K] = fold(stage.hidden_BKC[row, clip_K], keep_BK[row, clip_K])
        return Selection(torch.as_tensor(keep_BK), hidden_BKC)
