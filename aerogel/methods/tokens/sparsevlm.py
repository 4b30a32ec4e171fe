"""SparseVLM: text tokens that are like an image rate its tokens; some of those they drop come back merged (arXiv:2410.04417).

B rows, K positions before a block, V image tokens, T text tokens, R raters, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.methods.base import Before
from aerogel.methods.tokens.policy import Budget, TokenPolicy, counts, last_token
from aerogel.model.network import Network
from aerogel.numerics.token_selection import best, density_peaks, means
from aerogel.options import Count, CountOrZero, NonNegative, Share
from aerogel.runtime.token_types import TEXT
from aerogel.runtime.tokens.stage import Rule, Selection, Stage

_RATERS = "sparsevlm raters"


@dataclass(frozen=True)
class Sparsevlm(TokenPolicy):
    """Ranks image tokens behind several blocks by the attention of raters: words behind the image that are more like it than others.

    How many stay follows from the rank of the raters' attention, or is given. Some of the others are merged by their likeness: a merged
    token is the mean of its group and has the place, and the position, of the token at the group's centre. Merged tokens come on top of
    those that stay.
    """

    layers: tuple[CountOrZero, ...] = (2, 6, 15)
    """Numbers of the blocks behind which tokens are dropped, by the attention of these blocks."""
    keep: tuple[Budget, ...] = ()
    """Image tokens of a row that stay as they are behind each of the blocks: numbers, or shares of all. Empty: as the rank says. Published
    for 576 image tokens: 300, 200 and 110; 303, 110 and 36; 66, 30 and 17. On average over 32 blocks these are 203, 141 and 79."""
    scale: NonNegative = 13.5
    """Factor between the rank of the raters' attention (raters x image tokens) and the number of tokens that stay."""
    bias: NonNegative = 0.0
    """Tokens that stay besides."""
    recycled: Share = 0.3
    """Share of the dropped tokens, those with the best scores and one more, that are merged into groups; 0: none are."""
    group: Count = 10
    """Tokens to a group; there is one group more than that makes."""

    @classmethod
    def strength(cls, share: float) -> dict[str, Any]:
        """Return budgets for the three blocks that it has by default, each the same share of the one before."""
        return {"keep": tuple(round(share ** (number / 3), 4) for number in (1, 2, 3))}

    def problems(self, network: Network, before: Before) -> Iterator[str]:
        """Compare the numbers of budgets and blocks."""
        if self.keep and len(self.keep) != len(self.layers):
            yield f"keep has {len(self.keep)} budgets for {len(self.layers)} blocks; give one for each, or none"
        yield from super().problems(network, before)

    def watched(self, depth: int) -> tuple[int, ...]:
        """Return the blocks themselves."""
        return self.layers

    def rules(self, depth: int) -> Mapping[int, Rule]:
        """Return a rule before the block behind each of them, and before the first block one that finds the raters."""
        budgets = self.keep or (None,) * len(self.layers)
        stages = {layer + 1: _Stage(self, layer, budget) for layer, budget in zip(self.layers, budgets, strict=False)}
        return {0: find_raters, **stages}

    def count(self, rating_RV: Tensor) -> int:
        """Return how many image tokens stay by the rank of the raters' attention to them; all where it is full, else at least one goes."""
        tokens = rating_RV.shape[1]
        rank = int(torch.linalg.matrix_rank(rating_RV.float())) if tokens else 0
        return tokens if rank == tokens else max(0, min(int(rank * self.scale + self.bias), tokens - 1))

    def merged(self, hidden_DC: Tensor, score_D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of tokens, of those dropped, that stand for groups, and the groups' means (G, C)."""
        number = int(len(hidden_DC) * self.recycled) + 1
        if not self.recycled or not len(hidden_DC):
            return torch.zeros(0, dtype=torch.long, device=hidden_DC.device), hidden_DC[:0]
        best_D = score_D.argsort(descending=True, stable=True)[:number].sort().values
        groups = len(best_D) // self.group + 1
        found = density_peaks(hidden_DC[best_D], groups, groups)
        return best_D[found.centre_G], means(hidden_DC[best_D], found.group_N, len(found.centre_G))


@dataclass(frozen=True)
class _Stage:
    """The rule behind one block."""

    method: Sparsevlm
    layer: int
    budget: float | None

    def __call__(self, stage: Stage) -> Selection | None:
        """Keep the image tokens that are rated best, and groups of some of the others."""
        rating = self._ratings(stage, stage.kept.rows(stage.memory[_RATERS]) & stage.real_BK)
        present_B = stage.vision_BK.sum(1)
        if self.budget is None:
            count_B = torch.tensor([self.method.count(rating_RV) for rating_RV in rating], device=present_B.device)
        else:
            count_B = counts(self.budget, stage.vision_total_B)
        if bool((count_B >= present_B).all()):
            return None
        score_BK = torch.zeros(stage.kind_BK.shape, device=present_B.device)
        for row, rating_RV in enumerate(rating):
            score_BK[row, stage.vision_BK[row]] = rating_RV.mean(0)
        keep_BK = best(score_BK, stage.vision_BK, count_B) | ~stage.vision_BK
        hidden_BKC = stage.hidden_BKC.clone()
        for row in range(len(keep_BK)):
            away_D = (~keep_BK[row]).nonzero()[:, 0]
            centre_G, mean_GC = self.method.merged(stage.hidden_BKC[row, away_D], score_BK[row, away_D])
            keep_BK[row, away_D[centre_G]] = True
            hidden_BKC[row, away_D[centre_G]] = mean_GC
        return Selection(keep_BK, hidden_BKC)

    def _ratings(self, stage: Stage, rater_BK: Tensor) -> list[Tensor]:
        """The attention of each row's raters to its image tokens (R, V), a mean over heads."""
        count_B = rater_BK.sum(1).tolist()
        number_BR = (~rater_BK).byte().argsort(dim=1, stable=True)[:, : max(count_B)]
        probability_BRS = stage.watched[self.layer].attention(number_BR).mean(1)
        probability_BRK = probability_BRS[:, :, -rater_BK.shape[1] :]
        return [probability_BRK[row, :count][:, stage.vision_BK[row]] for row, count in enumerate(count_B)]


def find_raters(stage: Stage) -> None:
    """Remember which text tokens behind an image rate it; where there are none, the last token does."""
    rater_BK = torch.zeros_like(stage.vision_BK)
    behind_BK = (stage.vision_BK.cumsum(1) > 0) & (stage.kind_BK == TEXT) & stage.prompt_BK
    for row, embedded_KC in enumerate(stage.hidden_BKC):
        text_T = behind_BK[row].nonzero()[:, 0]
        if len(text_T):
            rater_BK[row, text_T[raters(embedded_KC[stage.vision_BK[row]], embedded_KC[text_T])]] = True
        else:
            rater_BK[row, last_token(stage)[row]] = True
    stage.memory[_RATERS] = rater_BK


def raters(vision_VC: Tensor, text_TC: Tensor) -> Tensor:
    """Return a mask of the text tokens that are more like an image than text is on average; all of them where none is.

    Each image token shares itself out among the text tokens by a softmax of their products.
    """
    share_T = (vision_VC.float() @ text_TC.float().T).softmax(1).mean(0)
    more_T = share_T > share_T.mean()
    return more_T if bool(more_T.any()) else torch.ones_like(more_T)
